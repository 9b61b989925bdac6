"""A small study as a dictionary for tests to modify."""

from typing import Any


def small() -> dict[str, Any]:
    return {
        "name": "small",
        "baseline": "adamw",
        "base": ["data=sample", "train.global_batch_size=8", "train.sequence_length=64"],
        "models": {
            "gpt2_nano": {"horizons": [25, 50, 100], "arm_horizons": [50, 100], "tune_at": 50, "seeds": [1, 2, 3]},
            "gpt2_micro": {
                "horizons": [50],
                "tune_at": 50,
                "seeds": [1, 2],
                "like": "gpt2_nano",
                "arms": ["adamw", "sophiag"],
            },
        },
        "tuning": {
            "seeds": [100],
            "method": "coordinate",
            "trials": 6,
            "threshold": 0.001,
            "retune": {"keys": ["optimizer.lr"], "trials": 3},
        },
        "arms": {
            "adamw": {
                "overrides": ["optimizer=adamw"],
                "search": {
                    "optimizer.lr": {"values": [1e-3, 2e-3, 4e-3], "widen": True},
                    "optimizer.betas[0]": {"values": [0.8, 0.9, 0.95], "start": 0.9},
                },
            },
            "sophiag": {
                "overrides": ["optimizer=sophiag"],
                "search": {
                    "optimizer.lr": {"values": [5e-4, 1e-3, 2e-3], "widen": True},
                    "optimizer.betas[0]": {"values": [0.8, 0.9, 0.96], "start": 0.9},
                },
            },
        },
        "ablations": {
            "sophiag_k1": {
                "of": "sophiag",
                "overrides": ["optimizer.hessian_interval=1"],
                "model": "gpt2_nano",
                "horizons": [50],
                "seeds": 2,
            }
        },
    }
