"""Malicious files in every place from which the project reads.

Each case must be refused with one of the project's own errors: no process is started, no code runs, no file outside is
read, and no more memory is used than the files hold.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data import DataError
from data.dataset import TokenDataset
from data.manifest import load_manifest
from models import GPT2, GPT2Config
from models.huggingface import from_huggingface, to_huggingface
from tests.data.token_directory import write_token_directory
from tests.faults.corruptions import STEPS, write_checkpoints
from training.records import checkpoint_name
from training.reliability.checkpoints import Checkpoint, CheckpointError, manifest_text

REFUSALS = (CheckpointError, DataError, ValueError)


class Bomb:
    """Creates a file named `exploded` when unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.fspath(self.place / "exploded"),)


def huge_header(path: Path, name: str) -> None:
    """A tiny safetensors file whose header claims a petabyte."""
    header = {name: {"dtype": "F32", "shape": [1 << 24, 1 << 24], "data_offsets": [0, 1 << 50]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)


def long_header(path: Path) -> None:
    """A safetensors file that claims a header longer than any memory."""
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def checkpoint_at(scratch: Path) -> Path:
    write_checkpoints(scratch / "checkpoints")
    return scratch / "checkpoints" / checkpoint_name(STEPS[-1])


def sign(directory: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Change a checkpoint's manifest and update its sizes and hashes."""
    import hashlib

    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    for name, entry in manifest["files"].items():
        if (directory / name).is_file():
            content = (directory / name).read_bytes()
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(manifest_text(manifest))


def model_at(scratch: Path) -> Path:
    directory = scratch / "model"
    shape = GPT2Config(vocab_size=300, n_layer=2, n_head=2, n_embd=32, block_size=16)
    to_huggingface(GPT2(shape)).save_pretrained(directory)
    return directory


def tokens_at(scratch: Path) -> Path:
    import numpy as np

    directory = scratch / "tokens"
    write_token_directory(directory, [np.arange(100) % 50], [np.arange(50)], vocab_size=50)
    return directory


# Checkpoints


def checkpoint_pickle(scratch: Path) -> None:
    directory = checkpoint_at(scratch)
    (directory / "rank-00000.safetensors").write_bytes(pickle.dumps(Bomb(scratch)))
    sign(directory)
    Checkpoint(directory)


def checkpoint_torch_file(scratch: Path) -> None:
    directory = checkpoint_at(scratch)
    torch.save(Bomb(scratch), directory / "rank-00000.safetensors")
    sign(directory)
    Checkpoint(directory)


def checkpoint_pickled_manifest(scratch: Path) -> None:
    directory = checkpoint_at(scratch)
    (directory / "manifest.json").write_bytes(pickle.dumps(Bomb(scratch)))
    Checkpoint(directory)


def checkpoint_outside(scratch: Path) -> None:
    directory = checkpoint_at(scratch)
    (directory / "rank-00000.safetensors").rename(directory.parent / "rank-00000.safetensors")

    def outside(manifest: dict[str, Any]) -> None:
        manifest["files"]["../rank-00000.safetensors"] = manifest["files"].pop("rank-00000.safetensors")

    sign(directory, outside)
    Checkpoint(directory)


def checkpoint_link(scratch: Path) -> None:
    directory = checkpoint_at(scratch)
    (directory / "rank-00000.safetensors").rename(scratch / "elsewhere")
    (directory / "rank-00000.safetensors").symlink_to(scratch / "elsewhere")
    Checkpoint(directory)


def checkpoint_huge(scratch: Path) -> None:
    directory = checkpoint_at(scratch)
    huge_header(directory / "rank-00000.safetensors", "model.w@0")
    sign(directory)
    Checkpoint(directory)


def checkpoint_long_header(scratch: Path) -> None:
    directory = checkpoint_at(scratch)
    long_header(directory / "rank-00000.safetensors")
    sign(directory)
    Checkpoint(directory)


# Hugging Face directories


def model_pickle(scratch: Path) -> None:
    directory = model_at(scratch)
    (directory / "model.safetensors").unlink()
    torch.save(Bomb(scratch), directory / "pytorch_model.bin")
    from_huggingface(directory)


def model_pickle_renamed(scratch: Path) -> None:
    directory = model_at(scratch)
    (directory / "model.safetensors").write_bytes(pickle.dumps(Bomb(scratch)))
    from_huggingface(directory)


def model_pickle_beside(scratch: Path) -> None:
    """A safetensors file of another name makes the directory look free of pickles."""
    directory = model_at(scratch)
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    torch.save(Bomb(scratch), directory / "pytorch_model.bin")
    from_huggingface(directory)


def model_link(scratch: Path) -> None:
    directory = model_at(scratch)
    (directory / "model.safetensors").rename(scratch / "elsewhere.safetensors")
    (directory / "model.safetensors").symlink_to(scratch / "elsewhere.safetensors")
    from_huggingface(directory)


def model_outside(scratch: Path) -> None:
    directory = model_at(scratch)
    (directory / "model.safetensors").rename(scratch / "secret.safetensors")
    save_file({"unused": torch.zeros(1)}, directory / "unused.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "../secret.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    from_huggingface(directory)


def model_adapter(scratch: Path) -> None:
    directory = model_at(scratch)
    (directory / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"})
    )
    from_huggingface(directory)


def model_huge_header(scratch: Path) -> None:
    directory = model_at(scratch)
    huge_header(directory / "model.safetensors", "transformer.wte.weight")
    from_huggingface(directory)


def _with_config(scratch: Path, **values: Any) -> Path:
    directory = model_at(scratch)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))
    return directory


def model_huge_config(scratch: Path) -> None:
    from_huggingface(_with_config(scratch, n_layer=10**7))


def model_huge_vocabulary(scratch: Path) -> None:
    from_huggingface(_with_config(scratch, vocab_size=10**12))


def model_negative(scratch: Path) -> None:
    from_huggingface(_with_config(scratch, n_embd=-32))


def model_not_a_number(scratch: Path) -> None:
    from_huggingface(_with_config(scratch, n_layer="__import__('os')"))


# Tokens


def tokens_outside(scratch: Path) -> None:
    directory = tokens_at(scratch)
    content = json.loads((directory / "manifest.json").read_text())
    content["splits"]["train"]["shards"][0]["file"] = "../../etc/passwd"
    (directory / "manifest.json").write_text(json.dumps(content))
    load_manifest(directory)


def tokens_pickle(scratch: Path) -> None:
    """NumPy's own format may hold pickled objects."""
    import numpy as np

    directory = tokens_at(scratch)
    np.save(directory / "train-00000.npy", np.array([Bomb(scratch)], dtype=object), allow_pickle=True)
    TokenDataset(directory, "train")


def tokens_huge(scratch: Path) -> None:
    import numpy as np

    directory = tokens_at(scratch)
    with (directory / "train-00000.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (1 << 50,)})
    TokenDataset(directory, "train")


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case
    for case in (
        *(checkpoint_pickle, checkpoint_torch_file, checkpoint_pickled_manifest, checkpoint_outside, checkpoint_link),
        *(checkpoint_huge, checkpoint_long_header, model_pickle, model_pickle_renamed, model_pickle_beside, model_link),
        *(model_outside, model_adapter, model_huge_header, model_huge_config, model_huge_vocabulary, model_negative),
        *(model_not_a_number, tokens_outside, tokens_pickle, tokens_huge),
    )
}


def fault_of(case: str, scratch: Path) -> str | None:
    """Return the fault in how a hostile file was handled; None if it was refused."""
    try:
        CASES[case](scratch)
    except REFUSALS as error:
        if not str(error).strip() or "\n" in str(error):
            return f"{case}: not one line: {error}"
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error}"
    else:
        return f"{case}: loaded"
    return f"{case}: code was run" if (scratch / "exploded").exists() else None


def meet_all(scratch: Path) -> dict[str, Any]:
    """Run every case once, each in its own directory."""
    faults = []
    for case in CASES:
        (scratch / case).mkdir(parents=True)
        fault = fault_of(case, scratch / case)
        faults += [fault] if fault else []
    return {"tried": len(CASES), "refused": len(CASES) - len(faults), "faults": faults}
