"""Fault injection: break runs on purpose and count what survives.

    python -m tests.faults                    all campaigns, half an hour on two cores (make test-faults)
    python -m tests.faults kills signals      some of them
    python -m tests.faults --report           only rewrite the table in docs/reliability.md from results/faults/

Each campaign writes results/faults/<name>.json, from which the table is made. The exit code is 1 if anything failed.
"""

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from analysis.pages import write_part

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "faults"
PAGE = ROOT / "docs" / "reliability.md"
PART = "faults"
SEED = 20

Corpus = Sequence[str]
Found = dict[str, dict[str, Any]]


def kills(corpus: Corpus, scratch: Path) -> Found:
    """SIGKILL at random moments: one process, two ranks of DDP, two of DeepSpeed ZeRO 2."""
    from tests.faults.kills import kill_again_and_again

    found: Found = {}
    zero = ("strategy=deepspeed", "strategy.zero_stage=2")
    for name, count, ranks, overrides in (("single", 120, 1, ()), ("ddp", 30, 2, ()), ("zero2", 30, 2, zero)):
        place = scratch / name
        place.mkdir()
        found[name] = kill_again_and_again(corpus, place, count, SEED, *overrides, ranks=ranks)
        allowed = 0.0 if ranks == 1 else 1e-6
        if found[name]["largest_difference"] > allowed:
            found[name]["faults"].append(f"the curve or the state differs by {found[name]['largest_difference']}")
        if found[name]["kills"] < count:
            found[name]["faults"].append(f"the run ended after {found[name]['kills']} of {count} kills")
    return found


def corruptions(corpus: Corpus, scratch: Path) -> Found:
    """Random damage to the files of a checkpoint."""
    from tests.faults.corruptions import corrupt

    return {"checkpoint": corrupt(scratch, 2000, SEED)}


def disks(corpus: Corpus, scratch: Path) -> Found:
    """A tmpfs that fills up, while a checkpoint and while the record is written."""
    from tests.faults.disks import MountRefusedError, full_while_logging, full_while_saving

    found: Found = {}
    for scenario in (full_while_saving, full_while_logging):
        (scratch / scenario.__name__).mkdir()
        try:
            found[scenario.__name__] = scenario(corpus, scratch / scenario.__name__)
        except MountRefusedError as refusal:
            print(f"disks: not tried, no tmpfs can be mounted here: {refusal}", file=sys.stderr)
            found[scenario.__name__] = {"skipped": str(refusal), "faults": []}
    return found


def signals(corpus: Corpus, scratch: Path) -> Found:
    """Every stop signal at random moments; second signals; the save of a larger model; shards truncated during a run."""
    from tests.faults.stops import (
        shrink_shards,
        stop_again_and_again,
        stop_torchrun,
        stop_twice,
        time_of_a_large_save,
    )

    for name in ("single", "ddp", "zero2", "torchrun", "shards"):
        (scratch / name).mkdir()
    zero = ("strategy=deepspeed", "strategy.zero_stage=2")
    return {
        "single": stop_again_and_again(corpus, scratch / "single", 60, SEED),
        "ddp": stop_again_and_again(corpus, scratch / "ddp", 60, SEED, ranks=2),
        "zero2": stop_again_and_again(corpus, scratch / "zero2", 15, SEED, *zero, ranks=2),
        "torchrun": stop_torchrun(corpus, scratch / "torchrun", 10, SEED),
        "second_signal": stop_twice(corpus, scratch, 8, SEED),
        "larger_model": time_of_a_large_save(corpus, scratch),
        "shards": shrink_shards(corpus, scratch / "shards", 10, SEED),
    }


def trackers(corpus: Corpus, scratch: Path) -> Found:
    """W&B behind a closed port: the record is that of a run without a tracker, and no file has the key."""
    from tests.faults.kills import compare, overrides_of
    from tests.faults.sittings import completed
    from tests.training.recording.test_trackers import KEY, wandb_at_a_closed_port

    steps = 24
    completed(overrides_of(corpus, scratch, "without", steps), scratch / "log")
    command = overrides_of(corpus, scratch, "run", steps, "tracker=wandb")
    said = completed(command, scratch / "log", prepare=wandb_at_a_closed_port)
    difference, faults = compare(scratch / "run", scratch / "without", steps)
    faults += [f"the record differs by {difference}"] if difference else []
    faults += [] if "tracker=wandb cannot be reached" in said else [f"no warning: {said}"]
    holders = [str(path) for path in scratch.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    return {"closed_port": {"tried": 1, "faults": faults + [f"{holder} has the key" for holder in holders]}}


def configurations(corpus: Corpus, scratch: Path) -> Found:
    """Random valid configurations build and step; mutated ones, broken and foreign files are refused in one line."""
    from tests.faults.configurations import (
        break_files,
        mutate_configurations,
        refuse_foreign_files,
        refuse_names,
        spoil_command_lines,
        spoil_files,
        step_configurations,
    )

    return {
        "valid": step_configurations(corpus, scratch, 250, SEED),
        "mutated": mutate_configurations(corpus, scratch, 2000, SEED),
        "command_lines": spoil_command_lines(scratch, 300, SEED),
        "files": spoil_files(scratch, 300, SEED),
        "broken": break_files(_made(scratch / "broken")),
        "foreign": refuse_foreign_files(_made(scratch / "foreign")),
        "names": refuse_names(_made(scratch / "names")),
    }


def corpora(corpus: Corpus, scratch: Path) -> Found:
    """Bad files among good ones, 1 GB documents, and damaged files of every format and of token directories."""
    from tests.faults.corpora import fuzz_readers, fuzz_tokens, refuse_all, refuse_gigabytes

    return {
        "bad_files": refuse_all(scratch),
        "gigabytes": refuse_gigabytes(scratch),
        "readers": fuzz_readers(scratch, 15_000, SEED),
        "tokens": fuzz_tokens(scratch, 6_000, SEED),
    }


def hostile(corpus: Corpus, scratch: Path) -> Found:
    """Pickles, links and paths that point outside, headers that claim more than the file holds."""
    from tests.faults.hostile import meet_all

    return {"files": meet_all(scratch)}


def directories(corpus: Corpus, scratch: Path) -> Found:
    """Foreign directories, links, FIFOs, devices, missing permissions and failing disks in place of a run's files."""
    from tests.faults import directories

    return directories.meet_all(corpus, scratch)


def records(corpus: Corpus, scratch: Path) -> Found:
    """Records and checkpoints that parse but are wrong."""
    from tests.faults.records import spoil_records

    return {"files": spoil_records(corpus, scratch, 400, SEED)}


def compilers(corpus: Corpus, scratch: Path) -> Found:
    """A cache of torch.compile with damaged libraries; signals to the process group while the compiler runs."""
    from tests.faults.compilers import interrupt_compilers, spoil_cache

    return {
        "cache": spoil_cache(corpus, _made(scratch / "cache")),
        "interrupted": interrupt_compilers(corpus, _made(scratch / "interrupted"), 4),
    }


def ranks(corpus: Corpus, scratch: Path) -> Found:
    """Ranks started with different configurations or tokens; ranks whose launcher is killed."""
    from tests.faults.ranks import kill_launchers, other_corpus, ranks_that_differ

    return {
        "differ": ranks_that_differ(corpus, _made(scratch / "differ")),
        "tokens": other_corpus(corpus, _made(scratch / "tokens")),
        "launchers": kill_launchers(corpus, _made(scratch / "launchers"), 12, SEED),
    }


def _made(place: Path) -> Path:
    place.mkdir()
    return place


CAMPAIGNS: dict[str, Callable[[Corpus, Path], Found]] = {
    campaign.__name__: campaign
    for campaign in (
        *(kills, corruptions, disks, signals, trackers, configurations, corpora, hostile),
        *(directories, records, compilers, ranks),
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", help=f"from {', '.join(CAMPAIGNS)}; all by default")
    parser.add_argument("--report", action="store_true", help="only rewrite the page's table")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.campaigns if name not in CAMPAIGNS]
    if unknown:
        parser.error(f"{unknown[0]}: no such campaign; choose from {', '.join(CAMPAIGNS)}")
    faults = 0
    if not arguments.report:
        faults = sum(run(name) for name in arguments.campaigns or CAMPAIGNS)
    write_part(PAGE, PART, report())
    return 1 if faults else 0


def run(name: str) -> int:
    """Run one campaign and write its results. Returns the number of faults."""
    import tests.conftest  # noqa: F401 (few threads, no network)
    from tests.faults import sittings
    from tests.training.runs import prepare_corpus

    logging.getLogger().setLevel(logging.ERROR)
    sittings.preload("deepspeed", "training.strategies.deepspeed")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as made:
        (Path(made) / "work").mkdir()
        found = CAMPAIGNS[name](prepare_corpus(Path(made)), Path(made) / "work")
    seconds = time.monotonic() - began
    record = {
        "campaign": name,
        "seed": SEED,
        "seconds": round(seconds, 1),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "versions": {package: metadata.version(package) for package in ("torch", "deepspeed", "hypothesis")},
        "found": found,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    faults = [f"{name}, {part}: {fault}" for part, values in found.items() for fault in values["faults"]]
    print(f"{name}: {'passed' if not faults else f'{len(faults)} FAULTS'}, {seconds:.0f} s", flush=True)
    for fault in faults[:20]:
        print(f"  {fault}", file=sys.stderr)
    return len(faults)


def report() -> str:
    """Return the table of docs/reliability.md, from results/faults/."""
    rows = ["| test | result | |", "| --- | --- | --- |"]
    found = {name: _found(name) for name in CAMPAIGNS}
    for part, what in {"single": "one process", "ddp": "two ranks, DDP", "zero2": "two ranks, ZeRO 2"}.items():
        if part in found["kills"]:
            values = found["kills"][part]
            survived = values["kills"] if not values["faults"] else 0
            difference = values["largest_difference"]
            exact = (
                "bit for bit the undisturbed run"
                if difference == 0
                else f"within {difference:.1g} of the undisturbed run"
            )
            rows.append(
                f"| {values['kills']} SIGKILLs in a row, {what} | {survived} survived, curve and final state {exact} | "
                f"{values['in_a_save']} inside a save; at most {values['most_steps_repeated']} steps repeated, "
                "0 lost past the last save |"
            )
    for values in found["corruptions"].values():
        rows.append(
            f"| {values['corruptions']} corruptions of a checkpoint | {values['detected']} detected | "
            f"{values['harmless_extra_files']} added files that no manifest names, never read |"
        )
    for part, what in {"full_while_saving": "saving", "full_while_logging": "logging"}.items():
        if part in found["disks"]:
            values = found["disks"][part]
            came = values.get("skipped") or (
                "one clear line, the previous checkpoint untouched, same curve once there is room"
            )
            rows.append(f"| disk full while {what} | {_unless_faults(values, came)} | |")
    for part, what in {
        "single": "one process",
        "ddp": "one of two ranks, DDP",
        "zero2": "one of two ranks, ZeRO 2",
        "torchrun": "torchrun and both of its ranks",
    }.items():
        if part in found["signals"]:
            values = found["signals"][part]
            rows.append(
                f"| {values['signals']} signals, of each kind in turn, {what} | {values['honoured']} honoured, "
                f"{values['steps_lost']} steps lost | saved and ended after {values['seconds_to_the_end']['median']:.2f} s "
                f"(median), {values['seconds_to_the_end']['longest']:.2f} s (longest) |"
            )
    if "second_signal" in found["signals"]:
        values = found["signals"]["second_signal"]
        rows.append(
            f"| {values['tried']} second signals | {values['at_once']} exited immediately | "
            f"{values['longest_seconds']:.2f} s at most |"
        )
    if "larger_model" in found["signals"]:
        values = found["signals"]["larger_model"]
        rows.append(
            f"| save of {values['parameters'] / 1e6:.0f}M weights after a signal, {values['bytes'] / 1e6:.0f} MB | "
            f"{values['save_seconds']:.1f} s | {values['seconds_to_the_end']:.1f} s from the signal to the end |"
        )
    if "shards" in found["signals"]:
        values = found["signals"]["shards"]
        came = _unless_faults(values, "saved and ended with one line, same curve once the shard was restored")
        rows.append(
            f"| {values['tried']} shards truncated during a run | {came} | {values['longest_seconds']:.2f} s at most |"
        )
    if "closed_port" in found["trackers"]:
        came = _unless_faults(found["trackers"]["closed_port"], "a warning, the record complete, the key in no file")
        rows.append(f"| W&B behind a closed port | {came} | |")
    if found["configurations"]:
        valid, mutated, lines = (found["configurations"][part] for part in ("valid", "mutated", "command_lines"))
        rows += [
            f"| {valid['tried']} random valid configurations | {valid['tried'] - len(valid['faults'])} built and stepped | "
            f"of {len(valid['by_optimizer'])} optimizers |",
            f"| {mutated['tried']} mutated configurations | {mutated['refused']} refused in one line, "
            f"{mutated.get('valid', 0)} still valid | {len(mutated['faults'])} tracebacks |",
            f"| {lines['tried']} invalid command lines | {lines['refused']} refused in one line | "
            f"{len(lines['faults'])} tracebacks |",
        ]
        files = found["configurations"].get("files")
        if files:
            rows.append(
                f"| {files['tried']} damaged YAML files | {files['refused']} refused in one line | "
                f"{len(files['faults'])} tracebacks |"
            )
        for part, what in {
            "broken": "files with a common mistake, as experiment or primary file, in runs, sweeps and --cfg",
            "foreign": "files that would run code, send keys elsewhere or record secrets",
            "names": "names that leave their directory, inject markup or exceed a file system's limit",
        }.items():
            if part in found["configurations"]:
                values = found["configurations"][part]
                rows.append(f"| {values['tried']} {what} | {values['refused']} refused in one line | |")
    if found["corpora"]:
        bad, long, readers, tokens = (
            found["corpora"][part] for part in ("bad_files", "gigabytes", "readers", "tokens")
        )
        rows += [
            f"| {bad['tried']} kinds of bad corpus files | {bad['refused']} refused by name | "
            f"{bad['before_any_work']} before any work; "
            f"{bad['kept_shards']} of {bad['finished_shards']} finished shards kept |",
            f"| {long['tried']} documents of 1 GB | {long['as_documented']} as documented | .txt streamed, others refused |",
            f"| {readers['tried']} damaged corpus files | {readers['refused']} refused by name, {readers['read']} read | "
            f"{len(readers['faults'])} crashes |",
            f"| {tokens['tried']} damaged token directories | {tokens['refused']} refused on opening or reading, "
            f"{tokens['found_by_verify']} by the full check | {len(tokens['faults'])} crashes |",
        ]
    for values in found["hostile"].values():
        rows.append(
            f"| {values['tried']} hostile files | {values['refused']} refused | no code run, no file outside read |"
        )
    from tests.faults.directories import KINDS

    for kind, (_, what, came) in KINDS.items():
        if kind in found["directories"]:
            values = found["directories"][kind]
            rows.append(f"| {values['tried']} {what} | {values['as_promised']} as documented | {came} |")
    for values in found["records"].values():
        rows.append(
            f"| {values['tried']} records that parse but are wrong | {values.get('refused', 0)} refused in one line, "
            f"{values.get('ran', 0)} ended with the same curve | {len(values['faults'])} faults |"
        )
    if "cache" in found["compilers"]:
        values = found["compilers"]["cache"]
        came = _unless_faults(values, "removed and compiled again, same curve")
        rows.append(f"| {values['libraries']} damaged libraries in torch.compile's cache | {came} | |")
    if "interrupted" in found["compilers"]:
        values = found["compilers"]["interrupted"]
        came = _unless_faults(values, "SIGINT: saved and ended with 75; the next start compiles")
        rows.append(f"| {values['tried']} SIGINTs and SIGKILLs to the process group while g++ runs | {came} | |")
    if "differ" in found["ranks"]:
        values = found["ranks"]["differ"]
        tried = values["tried"] + found["ranks"]["tokens"]["tried"]
        refused = values["refused"] + found["ranks"]["tokens"]["refused"]
        rows.append(f"| {tried} pairs of ranks that differ in a key or in their tokens | {refused} refused by name | |")
    if "launchers" in found["ranks"]:
        values = found["ranks"]["launchers"]
        came = _unless_faults(values, "no rank outlived it, none took part in the next run, same curve")
        rows.append(
            f"| {values['killed']} SIGKILLs to the launcher, half during start-up, half on one fixed port | {came} | "
            f"the last rank ended after {values['longest_orphan_seconds']} s at most |"
        )
    return "\n".join(rows) + "\n"


def _unless_faults(values: dict[str, Any], came: str) -> str:
    return came if not values["faults"] else f"{len(values['faults'])} faults"


def _found(name: str) -> Found:
    path = RESULTS / f"{name}.json"
    found: Found = json.loads(path.read_text())["found"] if path.exists() else {}
    return found


if __name__ == "__main__":
    sys.exit(main())
