"""The planned cost of a study: trials, steps, tokens, and hours at a given speed."""

from collections.abc import Mapping
from dataclasses import dataclass

from studies.expansion import arm_overrides, expected_trials
from studies.spec import StudySpec
from training.compose import compose
from training.config import RunConfig

# FLOPs of an estimate, in forward-backward passes over its tokens (models/flops.py).
_PASSES = {"gnb": 1, "empirical_fisher": 1, "hutchinson_differences": 2, "hutchinson": 3}


@dataclass
class Cost:
    """The maximum cost of an arm on a model."""

    tuning: int = 0  # runs
    reporting: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float | None = 0.0  # None if the model's speed is not given


def costs(spec: StudySpec, speeds: Mapping[str, float], start_seconds: float) -> dict[tuple[str, str], Cost]:
    """Return the cost by model and arm.

    Args:
        speeds: training tokens per second of AdamW, by model. Curvature passes and evaluations are added in proportion
            to their FLOPs; a slow optimizer step is not taken into account.
        start_seconds: overhead of a run in seconds: start, compilation, checkpoint.
    """
    found: dict[tuple[str, str], Cost] = {}
    configs: dict[tuple[str, str], RunConfig] = {}
    for (arm, model, horizon, phase), count in expected_trials(spec).items():
        key = model, arm
        if key not in configs:
            configs[key] = compose(arm_overrides(spec, arm, model))
        config, cost = configs[key], found.setdefault(key, Cost())
        if phase == "tuning":
            cost.tuning += count
        else:
            cost.reporting += count
        tokens = horizon * config.train.global_batch_size * config.train.sequence_length
        cost.steps += count * horizon
        cost.tokens += count * tokens
        speed = speeds.get(model)
        if speed is None or cost.seconds is None:
            cost.seconds = None
            continue
        evaluations = 1 + -(-horizon // config.eval.interval)
        evaluated = evaluations * (config.eval.tokens or 0) / 3  # a forward is a third of a training step
        cost.seconds += count * (start_seconds + (tokens * (1 + curvature_share(config)) + evaluated) / speed)
    return found


def curvature_share(config: RunConfig) -> float:
    """Return the FLOPs of the curvature passes divided by those of training."""
    curvature = config.optimizer.curvature
    if curvature is None:
        return 0.0
    return _PASSES[curvature.estimator] * curvature.batch_fraction / curvature.hessian_interval
