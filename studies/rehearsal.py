"""A rehearsal of a study: every part of it, from the searches to the report, with a tiny model and runs of a few steps."""

from collections.abc import Sequence
from typing import Any

from studies.spec import StudySpec, validate_spec

STEPS = 4  # of the shortest horizon; each longer one has twice the steps of the one before
# Small for any recipe. The data stay the study's own, unless the command line has others.
TINY = (
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=64"),
    *("train.global_batch_size=4", "train.micro_batch_size=null", "train.sequence_length=64"),
    *("train.precision=auto", "train.compile=false", "schedule.warmup_steps=null"),
    *("eval.interval=1000000", "eval.tokens=4096", "eval.micro_batch_size=null", "checkpoint.interval=null"),
)


_WARMUP = "schedule.warmup_steps"


def _in_few_steps(space: dict[str, Any]) -> dict[str, Any]:
    """Return a search of as many warm-ups as before, where STEPS allow it."""
    return {"values": list(range(STEPS))[: len(space["values"])]} if "values" in space else {"low": 1, "high": 2}


def rehearsal(spec: StudySpec, overrides: Sequence[str] = ()) -> StudySpec:
    """Return a small study of the same arms, models and searches.

    Each model has its first reporting seed and as many horizons as before; a search over ranges has two settings, of which
    both run again as finalists, if the study has some. Other searches and re-tunings have their own number of trials, since
    they might not get through their keys with fewer.

    Args:
        overrides: configuration overrides of every run, such as `data=sample`.
    """
    values: dict[str, Any] = spec.model_dump(mode="json", exclude_defaults=True)
    values |= {
        "name": f"{spec.name}_rehearsal",
        "description": f"A rehearsal of {spec.name}; its numbers mean nothing.",
    }
    given = {override.partition("=")[0] for override in overrides}
    tiny = [*(one for one in TINY if one.partition("=")[0] not in given), *overrides]
    replaced = {override.partition("=")[0] for override in tiny}

    def kept(lines: Sequence[str]) -> list[str]:
        return [line for line in lines if line.partition("=")[0] not in replaced]

    steps: dict[tuple[str, int], int] = {}
    for name, model in values["models"].items():
        for rank, horizon in enumerate(sorted(model["horizons"])):
            steps[name, horizon] = STEPS * 2**rank
        for key in ("horizons", "arm_horizons"):
            model[key] = [steps[name, horizon] for horizon in model.get(key, ())]
        model |= {"tune_at": steps[name, model["tune_at"]], "seeds": model["seeds"][:1]}
        model["overrides"] = [*kept(model.get("overrides", ())), *tiny]
    values["base"] = kept(values.get("base", ()))
    for name, arm in values["arms"].items():
        if _WARMUP in arm.get("search", {}):
            arm["search"][_WARMUP] = _in_few_steps(arm["search"][_WARMUP])
        arm |= {"overrides": kept(arm["overrides"]), "seeds": None}
        arm["horizons"] = sorted(
            {
                steps[m, h]
                for m in spec.models
                for h in arm.get("horizons", ())
                if (m, h) in steps and name in spec.arms_on(m)
            }
        )
    for ablation in values.get("ablations", {}).values():
        if _WARMUP in ablation.get("values", {}):
            ablation["values"][_WARMUP] = 1
        ablation["horizons"] = [steps[ablation["model"], horizon] for horizon in ablation["horizons"]]
    tuning = values["tuning"]
    if tuning["method"] in ("random", "halton"):
        tuning["trials"] = 2 * len(tuning["seeds"])
    if "finalists" in tuning:
        tuning["finalists"] |= {"settings": 2, "seeds": tuning["finalists"]["seeds"][:1]}
    return validate_spec(values, values["name"])
