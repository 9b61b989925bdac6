"""Reference times: the time of each kind of work in each arm, measured in turn on an idle machine."""

import os
from collections.abc import Callable
from pathlib import Path

from analysis.runs import load_run
from analysis.trials import REFERENCE_TIMES_FILE
from analysis.wallclock import ReferenceTimes, reference_times
from studies.expansion import Trial, expand
from studies.runner import Launch
from studies.spec import StudySpec
from studies.store import Places, outcomes
from training.compose import compose

# Keys of a trial that a short run sets itself.
_OWN = ("train.steps", "eval.interval", "schedule.warmup_steps")


def measure(
    spec: StudySpec,
    places: Places,
    launch: Launch,
    *,
    steps: int = 40,
    rounds: int = 3,
    log: Callable[[str], None] = print,
) -> ReferenceTimes:
    """Time a short run of every arm on every model, interleaved so that drift of the machine affects all alike.

    Each arm runs with its reported hyper-parameters. Ablations are not timed. The result is written next to the study's
    tables for the report.

    Args:
        steps: of each run, at least; more if the curvature is estimated rarely.

    Raises:
        ValueError: no reported trial is planned yet.
        RuntimeError: a run failed, or the machine is busy.
    """
    load = os.getloadavg()[0]
    if load > 0.3 * (os.cpu_count() or 1):
        raise RuntimeError(f"the machine is busy (load {load:.1f}); measure times when it is idle")
    chosen: dict[tuple[str, str], Trial] = {}
    for trial in expand(spec, outcomes(places)).trials:
        if trial.phase == "reporting" and trial.arm in spec.arms:
            chosen.setdefault((trial.arm, trial.model), trial)
    if not chosen:
        raise ValueError(f"{spec.name}: no arm has tuned hyper-parameters yet; run the study first")
    curvatures = [compose(trial.overrides).optimizer.curvature for trial in chosen.values()]
    # At least three refreshes after the first, which is cold.
    steps = max([steps, *(3 * one.hessian_interval + 1 for one in curvatures if one is not None)])
    measured = []
    for turn in range(rounds):
        for (arm, model), trial in chosen.items():
            name = f"time-{arm}-{model}-{turn}"
            log(f"timing {arm} on {model}, round {turn + 1} of {rounds}")
            overrides = [one for one in trial.overrides if one.split("=")[0] not in _OWN]
            own = [f"train.steps={steps}", f"eval.interval={steps}", "schedule.warmup_steps=null"]
            own += ["overwrite=true", f"name={name}"]
            (code,) = launch([[*overrides, *own, f"output_dir={places.work}"]])
            if code != 0:
                raise RuntimeError(f"{name} failed with exit code {code}, see {places.work / name}.log")
            measured.append((arm, load_run(places.work / name)))
    hardware = measured[0][1].environment.get("hardware", {})
    machine = hardware.get("gpu") or hardware.get("cpu") or "this machine"
    times = reference_times(measured, f"{rounds} rounds of {steps} steps of each arm in turn on {machine}, median")
    path = Path(places.records) / REFERENCE_TIMES_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    times.save(path)
    return times
