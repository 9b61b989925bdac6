"""Run and read a study.

    python scripts/study.py run study=cpu_scale                 run it, or resume it
    python scripts/study.py run study=cpu_scale --hours 2       start no trial after two hours
    python scripts/study.py run study=cpu_scale hydra/launcher=joblib hydra.launcher.n_jobs=4
    python scripts/study.py run study=cpu_scale tracker=wandb   mirror the runs to W&B
    python scripts/study.py plan study=cpu_scale                trials, steps and tokens
    python scripts/study.py plan study=cpu_scale --speed gpt2_micro=26000 gpt2_mini=10500     and hours
    python scripts/study.py rehearse study=paper_125m data=sample      every part of it, in minutes, with a tiny model
    python scripts/study.py status study=cpu_scale              progress
    python scripts/study.py times study=cpu_scale               reference times, on an idle machine
    python scripts/study.py compact study=cpu_scale             add finished runs to the tables while the study runs
    python scripts/study.py verify study=cpu_scale              rerun one trial of each arm and compare the curves
    python scripts/study.py verify study=cpu_scale --trials <trial> ...      rerun these trials
    python scripts/study.py verify study=mine allow_code=true   also trials whose optimizer.factory or model.architecture you
                                                                trust
    python scripts/study.py report study=cpu_scale              HTML, Markdown, JSON
    python scripts/study.py sweep study=cpu_scale               W&B sweep files

    python scripts/study.py run study=challenge challenger.factory=my_optimizer:Mine challenger.search=my_space.yaml
                                                                your optimizer against recorded arms (docs/challenge.md)

`study=` is a file in configs/study, or a path. Runs go to runs/<study>, tables and report to results/<study>.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from rich.console import Console

from data.files import cannot_use
from studies.spec import StudySpec, load_spec
from training.config import ConfigurationError
from training.exits import EXIT_PREEMPTED, refuse
from training.launching.jobs import launch, side_by_side
from training.recording.terminal import SafeConsole, printable
from training.records import RecordError
from training.secrets import redacted

if TYPE_CHECKING:
    from studies.runner import Launch
    from studies.store import Places

# Overrides allowed on the command line: they do not change the curves, which the study file determines.
RUN_TIME = ("tracker", "launcher", "strategy", "checkpoint", "train.micro_batch_size", "train.compile", "train.device")
HYDRAS_LAUNCHER = {"local": "basic", "slurm": "submitit_slurm", "submitit": "submitit_local"}  # by our names of them
ALLOW = "allow_code=true"  # verify: records name the code of an external optimizer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "command", choices=("run", "plan", "rehearse", "status", "compact", "times", "verify", "report", "sweep")
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="study=…, hydra/launcher=…, tracker=…")
    parser.add_argument("--hours", type=float, help="start no trial after this many hours")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="parent directory of the runs (default: runs)")
    parser.add_argument(
        "--records", type=Path, default=Path("results"), help="parent directory of the records (default: results)"
    )
    parser.add_argument("--trials", nargs="+", default=[], metavar="TRIAL", help="verify: names from trials.csv")
    parser.add_argument("--sweeps", type=Path, help="sweep: output directory (default: results/<study>/sweeps)")
    parser.add_argument(
        "--speed",
        nargs="+",
        default=[],
        metavar="MODEL=TOKENS",
        help="plan: AdamW's training tokens per second, by model",
    )
    parser.add_argument("--start", type=float, default=10.0, help="plan: seconds to start and compile a run")
    options = parser.parse_args(arguments)
    console = SafeConsole(stderr=options.command in ("run", "rehearse", "times", "verify"))
    try:
        own = [one for one in options.overrides if one.startswith("challenger.")]
        rehearse = options.command == "rehearse"
        study, launcher, extras = split([one for one in options.overrides if one not in own], any_key=rehearse)
        spec = baselines = load_spec(study)
        # pyarrow comes with these, which a mistake need not wait for.
        if own:
            from studies.challenge import challenger_of, prepare, with_challenger

            spec = with_challenger(baselines, challenger_of(own))
        from studies.overview import plan_table, speeds_of, status_table
        from studies.rehearsal import rehearsal
        from studies.store import Places, compact
        from studies.sweeps import write_sweeps

        if rehearse:
            spec, extras, options.records = rehearsal(spec, extras), [], options.work / "rehearsals"
        places = Places.of(spec.name, options.work, options.records)
        launching = functools.partial(launch_with, launcher=launcher, extras=extras)
        if options.command in ("run", "rehearse"):
            if own and not rehearse:
                prepare(baselines, spec, places, options.records, log_to(console))
            return run(spec, places, launching, side_by_side(launcher), options.hours, console)
        if options.command == "verify":
            return verify_records(places, options.trials, console, allow_code=ALLOW in extras)
        if options.command == "report":
            return report(places, console)
        if options.command == "plan":
            console.print(plan_table(spec, speeds_of(spec, options.speed), options.start))
        elif options.command == "status":
            console.print(status_table(spec, places))
        elif options.command == "compact":
            console.print(f"{len(compact(spec, places))} trials added to {places.records}", highlight=False)
        elif options.command == "times":
            from studies.times import measure

            times = measure(spec, places, launching, log=log_to(console))
            console.print(f"reference times ({times.source}) in {places.records}", highlight=False)
        else:
            for path in write_sweeps(spec, options.sweeps or places.records / "sweeps"):
                console.print(f"wandb sweep {path}", highlight=False)
    except (ConfigurationError, FileNotFoundError, RecordError, RuntimeError, ValueError) as error:
        print(printable(redacted(f"error: {' '.join(str(error).split())}")), file=sys.stderr)
        return 2 if isinstance(error, (ConfigurationError, RecordError)) else 1
    except OSError as error:
        return refuse(cannot_use(error, options.records))
    return 0


def split(overrides: Sequence[str], *, any_key: bool = False) -> tuple[str, list[str], list[str]]:
    """Split into the study's name, the launcher's overrides and the overrides of every run.

    Args:
        any_key: also overrides that change the curves, for a rehearsal.

    Raises:
        ConfigurationError: no study=, or an override that belongs in the study file.
    """
    study, launcher, extras = None, [], []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if "=" not in override and not override.startswith("~"):
            raise ConfigurationError(f"{override}: not an override; write study={override}")
        if key == "launcher":
            named = HYDRAS_LAUNCHER.get(value, value)
            raise ConfigurationError(f"{override}: Hydra launches a study's trials; give hydra/launcher={named}")
        if key == "study":
            study = value
        elif key.startswith("hydra"):
            launcher.append(override)
        elif any_key or override == ALLOW or any(key == one or key.startswith(f"{one}.") for one in RUN_TIME):
            extras.append(override)
        else:
            raise ConfigurationError(f"{override}: this override changes the runs; put it in the study file")
    if not study:
        raise ConfigurationError("study: missing; give study=<a name in configs/study, or a path>")
    return study, launcher, extras


def launch_with(jobs: Sequence[Sequence[str]], *, launcher: Sequence[str], extras: Sequence[str]) -> list[int]:
    """Launch jobs with the launcher and the run-time overrides of the command line."""
    return launch([[*job, *extras] for job in jobs], launcher)


def run(
    spec: StudySpec, places: Places, launching: Launch, together: int | None, hours: float | None, console: Console
) -> int:
    """Run or resume a study; the exit code tells whether it is finished."""
    from studies.runner import run_study

    sitting = run_study(spec, places, launching, at_once=together, hours=hours, log=log_to(console))
    console.print(f"{sitting.ran} trials finished; tables in {places.records}", highlight=False)
    if sitting.finished:
        return report(places, SafeConsole())
    return EXIT_PREEMPTED if sitting.interrupted else 1


def report(places: Places, console: Console) -> int:
    """Write the report next to the study's tables and print a summary."""
    from analysis.report import print_summary, write_report
    from analysis.results import analyse
    from analysis.trials import load_study

    results = analyse(load_study([places.records]))
    written = write_report(results, places.records)
    print_summary(results, console)
    console.print(f"report: {written.html}", highlight=False, markup=False)
    return 0


def verify_records(places: Places, names: Sequence[str], console: Console, *, allow_code: bool) -> int:
    """Rerun trials; exit code 1 if one does not match its record."""
    from analysis.trials import load_study
    from studies.verify import chosen, unequal, verify

    trials = chosen(load_study([places.records]), names)
    results = verify(trials, places.work / "verify", places.records, allow_code=allow_code, log=log_to(console))
    apart = unequal(results)
    for line in apart:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not apart:
        most = max(one.difference for one in results)
        console.print(f"{len(results)} runs match their records within {most:.2g} nats", highlight=False)
    return 1 if apart else 0


def log_to(console: Console) -> functools.partial[None]:
    return functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
