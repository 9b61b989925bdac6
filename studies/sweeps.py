"""W&B sweep files from a study's search spaces, to let W&B's agents search instead."""

from pathlib import Path
from typing import Any

import yaml

from data.files import write_atomically
from studies.expansion import ELEMENT, common_overrides, composed, value_overrides
from studies.spec import Choices, Range, Space, StudySpec, points

_METHODS = {"grid": "grid", "random": "random", "halton": "random", "coordinate": "bayes"}


def sweep(spec: StudySpec, arm: str, model: str) -> dict[str, Any]:
    """Return the W&B configuration of a sweep of one arm on one model at its tuning horizon.

    W&B has no coordinate descent; its Bayesian search replaces it. List elements are swept as whole lists, because the
    command line cannot override an element; ranges of them at their quarters.
    """
    search = spec.arms[arm].search
    horizon = spec.models[model].tune_at
    fixed = [
        *common_overrides(spec, spec.arms[arm], model),
        f"train.steps={horizon}",
        f"seed={spec.tuning.seeds[0]}",
        "tracker=wandb",
        f"tracker.group={spec.name}-{model}",
    ]
    parameters: dict[str, Any] = {}
    lists: dict[str, dict[str, Choices]] = {}
    for key, space in search.items():
        element = ELEMENT.match(key)
        if element is not None:
            lists.setdefault(element["key"], {})[key] = space.ladder
        else:
            parameters[key] = _parameter(space)
    for name, elements in lists.items():
        written = [value_overrides(one, lambda: composed(tuple(fixed))) for one in points(elements)]
        parameters[name] = {"values": [overrides[0].partition("=")[2] for overrides in written]}
    return {
        "name": f"{spec.name}: {arm} on {model}, {horizon} steps",
        "program": "train.py",
        "method": _METHODS[spec.tuning.method],
        # The final validation loss, not the lowest one during the run.
        "metric": {"name": "final_val_loss", "goal": "minimize"},
        "run_cap": spec.tuning.trials,
        "parameters": parameters,
        "command": ["${env}", "${interpreter}", "${program}", *fixed, "${args_no_hyphens}"],
    }


def write_sweeps(spec: StudySpec, directory: Path) -> list[Path]:
    """Write a file for each arm with a search on each model with a full search."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for model, model_spec in spec.models.items():
        for arm in spec.arms_on(model):
            if spec.arms[arm].search and model_spec.like is None:
                path = directory / f"{arm}-{model}.yaml"
                write_atomically(path, yaml.safe_dump(sweep(spec, arm, model), sort_keys=False))
                written.append(path)
    return written


def _parameter(space: Space) -> dict[str, Any]:
    if isinstance(space, Range):
        distribution = "log_uniform_values" if space.scale == "log" else "uniform"
        return {"distribution": distribution, "min": space.low, "max": space.high}
    return {"values": list(space.values)}
