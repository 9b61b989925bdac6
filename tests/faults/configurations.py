"""Random configurations: a valid one builds and steps, a mutated one is valid or refused in one line.

Hypothesis draws them, for the tests a few and for scripts/faults.py many: `step_configurations` and `mutate_configurations`
count what came of each and list what should not have.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.training.runs import lines
from training.command import main
from training.compose import CONFIG_DIRECTORY, compose_dictionary, known_keys, validate
from training.config import ConfigurationError, RunConfig
from training.run import execute

OPTIMIZERS = ("adamw", "lion", "sophiag", "sophiah", "muon", "signum", "adahessian")
SCHEDULES = ("cosine", "wsd", "constant")


def drawn(examples: int, number: int) -> Any:
    """The settings of a campaign: so many examples of a seed, no shrinking, nothing kept between two runs."""

    def decorate(test: Any) -> Any:
        chosen = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        return seed(number)(chosen(test))

    return decorate


@st.composite
def valid_overrides(draw: st.DrawFn) -> dict[str, Any]:
    """Dotted keys and values of a valid run of one or two small steps; the groups under `group=`."""
    optimizer = draw(st.sampled_from(OPTIMIZERS))
    heads = draw(st.integers(1, 3))
    world_batch = draw(st.integers(1, 6))
    length = draw(st.integers(1, 24))
    steps = draw(st.integers(1, 2))
    values: dict[str, Any] = {
        "optimizer=": optimizer,
        "schedule=": draw(st.sampled_from(SCHEDULES)),
        "strategy=": draw(st.sampled_from(("ddp", "single"))),
        "model.n_layer": draw(st.integers(1, 3)),
        "model.n_head": heads,
        "model.n_embd": heads * draw(st.sampled_from((1, 2, 8, 10))),
        "model.block_size": length + draw(st.integers(0, 8)),
        "model.bias": draw(st.booleans()),
        "model.dropout": draw(st.sampled_from((0.0, 0.1, 0.9))),
        "model.attention_layer_scaling": draw(st.booleans()),
        "train.steps": steps,
        "train.global_batch_size": world_batch,
        "train.micro_batch_size": draw(st.sampled_from([None, *(d for d in range(1, 7) if world_batch % d == 0)])),
        "train.sequence_length": length,
        "train.precision": draw(st.sampled_from(("fp32", "bf16", "auto"))),
        "train.grad_clip": draw(st.none() | st.floats(1e-6, 1e6)),
        "train.max_skipped_steps": draw(st.integers(0, 3)),
        "train.deterministic": False,
        "eval.interval": draw(st.integers(1, 3)),
        "eval.tokens": draw(st.integers(length, 200)),
        "eval.micro_batch_size": draw(st.none() | st.integers(1, 9)),
        "checkpoint.interval": draw(st.none() | st.integers(1, 3)),
        "checkpoint.keep": draw(st.integers(1, 3)),
        "checkpoint.keep_every": draw(st.none() | st.integers(1, 3)),
        "checkpoint.keep_best": draw(st.booleans()),
        "guards.spike_deviations": draw(st.none() | st.floats(0.1, 100)),
        "guards.weights_interval": draw(st.none() | st.integers(1, 3)),
        "guards.hang_minutes": draw(st.none() | st.floats(1, 100)),
        "schedule.warmup_steps": draw(st.integers(0, steps - 1)),
        "schedule.final_ratio": draw(st.floats(0, 1)),
        "optimizer.lr": draw(st.floats(1e-9, 1.0)),
        "optimizer.weight_decay": draw(st.floats(0, 1)),
        "seed": draw(st.integers(0, 2**40)),
    }
    if optimizer in ("sophiag", "sophiah", "adahessian"):
        values["optimizer.hessian_interval"] = draw(st.integers(1, 4))
        values["optimizer.batch_fraction"] = draw(st.floats(0.01, 1))
        estimators = ("hutchinson", "hutchinson_differences")
        if optimizer != "adahessian":
            estimators += ("gnb", "empirical_fisher")
            values["optimizer.gamma"] = draw(st.floats(1e-6, 10))
            values["optimizer.clip"] = draw(st.booleans())
        values["optimizer.estimator"] = draw(st.sampled_from(estimators))
    return values


class Composer:
    """Compositions of each choice of groups, made once: Hydra takes longer than the run."""

    def __init__(self, corpus: Sequence[str], output_dir: Path) -> None:
        self._corpus = list(corpus)
        self._output_dir = output_dir
        self._made: dict[tuple[str, ...], dict[str, Any]] = {}

    def values(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """The plain values of a configuration, before validation."""
        groups = tuple(f"{key}{value}" for key, value in chosen.items() if key.endswith("="))
        if groups not in self._made:
            fixed = ["model=gpt2_nano", "train.compile=false", "train.device=cpu", f"output_dir={self._output_dir}"]
            self._made[groups] = compose_dictionary([*self._corpus, *fixed, "name=run", *groups])
        values = copy.deepcopy(self._made[groups])
        for key, value in chosen.items():
            if not key.endswith("="):
                *path, leaf = key.split(".")
                section = values
                for part in path:
                    section = section[part]
                section[leaf] = value
        values["seeds"] = dict.fromkeys(("model", "data", "curvature"), values["seed"])
        return values


def step_configurations(corpus: Sequence[str], scratch: Path, examples: int, number: int) -> dict[str, Any]:
    """Build and run `examples` random valid configurations for one or two steps each."""
    composer = Composer(corpus, scratch / "configurations")
    counts, optimizers, faults = Counter[str](), Counter[str](), list[str]()

    @drawn(examples, number)
    @given(valid_overrides())
    def step(chosen: dict[str, Any]) -> None:
        shutil.rmtree(scratch / "configurations", ignore_errors=True)
        counts["tried"] += 1
        optimizers[chosen["optimizer="]] += 1
        try:
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = execute(validate(composer.values(chosen)))
            made = [line["step"] for line in lines(outcome.directory, "train")]
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}: {chosen}")
            return
        if outcome.status == "diverged" or made == list(range(1, chosen["train.steps"] + 1)):
            counts[outcome.status] += 1
        else:
            faults.append(f"{outcome.status} after steps {made}: {chosen}")

    step()
    return {**counts, "by_optimizer": dict(sorted(optimizers.items())), "faults": faults}


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**40, -(10**40)]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "auto", "null", "nan", "${seed}", "../x", "\n", "\x00", "os.system", "1e400", "a" * 5000]),
    st.lists(st.integers() | st.text(max_size=3) | st.none(), max_size=3),
    st.dictionaries(st.text(max_size=5) | st.just("_target_"), st.integers() | st.just("os.system"), max_size=3),
    st.binary(max_size=4),
    st.tuples(st.floats(), st.floats()),
)
KEYS = sorted(known_keys())


@st.composite
def mutated(draw: st.DrawFn, composer: Composer) -> tuple[dict[str, Any], list[str]]:
    """A valid configuration with one to three changes; the changes in words."""
    values = composer.values(draw(valid_overrides()))
    done = []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(KEYS)).split(".")
        section: Any = values
        for part in path[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            continue
        match draw(st.sampled_from(("set", "set", "set", "remove", "add", "rename"))):
            case "set":
                section[path[-1]] = draw(JUNK)
                done.append(f"{'.'.join(path)}={section[path[-1]]!r}")
            case "remove":
                section.pop(path[-1], None)
                done.append(f"~{'.'.join(path)}")
            case "add":
                key = draw(st.sampled_from(("_target_", "_partial_", "__class__", "lr ", "Lr")) | st.text(max_size=6))
                section[key] = draw(JUNK)
                done.append(f"+{key!r}={section[key]!r}")
            case "rename":
                if path[-1] in section:
                    section[path[-1] + draw(st.sampled_from(("s", "_", "x")))] = section.pop(path[-1])
                    done.append(f"rename {'.'.join(path)}")
    return values, done


def mutate_configurations(corpus: Sequence[str], scratch: Path, examples: int, number: int) -> dict[str, Any]:
    """Validate `examples` randomly spoilt configurations: each is valid, or refused in one line without control codes."""
    composer = Composer(corpus, scratch / "configurations")
    counts, faults = Counter[str](), list[str]()

    @drawn(examples, number)
    @given(st.data())
    def mutate(data: st.DataObject) -> None:
        values, done = data.draw(mutated(composer))
        counts["tried"] += 1
        try:
            config = validate(values)
        except ConfigurationError as error:
            counts["refused"] += 1
            line = f"error: {' '.join(str(error).split())}"  # as training.command.refuse prints it
            if len(line) < 20 or not any(part in line for part in ("=", ":", ";")):
                faults.append(f"{done}: {line}")
        except Exception as error:
            faults.append(f"{done}: {type(error).__name__}: {error}")
        else:
            counts["valid"] += 1
            _round_trip(config, done, faults)

    mutate()
    return {**counts, "faults": faults}


def _round_trip(config: RunConfig, done: list[str], faults: list[str]) -> None:
    """What is valid must have a name, a hash, and be the same when a resumed run reads it from its record."""
    try:
        again = validate(config.model_dump(mode="json") | {"name": config.run_name})
        if (again.identity(), again.seed) != (config.identity(), config.seed):
            faults.append(f"{done}: valid, and another configuration when read back")
    except Exception as error:
        faults.append(f"{done}: valid, and then {type(error).__name__}: {error}")


OVERRIDES = st.one_of(
    st.text(min_size=1, max_size=20),
    st.builds("{}{}={}".format, st.sampled_from(("", "+", "++", "~")), st.sampled_from(KEYS), st.text(max_size=12)),
    st.builds(
        "{}={}".format,
        st.sampled_from(KEYS),
        st.sampled_from(("[", "{", "${", "${x}", "'", '"', "[1,", "{a:1}", "null", "1e999", "-", "\\", "=", "@")),
    ),
    st.builds("{}={}".format, st.sampled_from(("model", "data", "optimizer", "strategy")), st.text(max_size=8)),
    st.sampled_from(
        [
            *(
                "optimizer._target_=os.system",
                "+_target_=os.system",
                "model=../../etc/passwd",
                "+hydra.x._target_=os.system",
            ),
            *(
                "optimizer@model=adamw",
                "~optimizer",
                "experiment=../config",
                "train.steps=${eval:1}",
                "name=${oc.env:NO}",
            ),
        ]
    ),
)


def spoil_command_lines(scratch: Path, examples: int, number: int) -> dict[str, Any]:
    """Give train.py `examples` random command lines that cannot be run: exit code 2 and one line on standard error."""
    counts, faults = Counter[str](), list[str]()
    # A command line that happens to be valid stops at its corpus, which is not there.
    missing = ["data=text", f"data.paths=[{scratch}/none.txt]", f"data.directory={scratch}/none"]

    @drawn(examples, number)
    @given(st.lists(OVERRIDES, min_size=1, max_size=2))
    def spoil(overrides: list[str]) -> None:
        if any(o.startswith("-") for o in overrides) or any(o.startswith("launcher") for o in overrides):
            return  # Hydra's own flags; launchers that would start processes
        counts["tried"] += 1
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = main([*missing, f"output_dir={scratch}/never", "train.compile=false", *overrides])
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            faults.append(f"{overrides}: {type(error).__name__}: {error}")
            return
        lines_said = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        if code == 2 and len(lines_said) == 1 and "Traceback" not in said.getvalue():
            counts["refused"] += 1
        else:
            faults.append(f"{overrides}: exit code {code}, {said.getvalue()!r}")

    spoil()
    if os.path.exists(scratch / "never"):
        faults.append("a refused command line has left files")
    return {**counts, "faults": faults}


PLACE = "# @package _global_\n"
PIECES = st.one_of(
    st.text(max_size=3).map(str.encode),
    st.binary(max_size=3),
    st.sampled_from(
        [b"\t", b"\n", b"\0", b": ", b"- ", b"{", b"[", b"&a ", b"*a", b"!!set ", b"'", b"#", b"${", b"<<: ", b"? "]
    ),
)


def spoil_files(scratch: Path, examples: int, number: int) -> dict[str, Any]:
    """Give train.py `examples` randomly damaged YAML files of an experiment: exit code 2 and one line on standard error."""
    counts, faults = Counter[str](), list[str]()
    file = scratch / "files" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = PLACE.encode() + (CONFIG_DIRECTORY / "config.yaml").read_bytes().partition(b"\nname:")[2]
    # A file that is still valid stops at its corpus, which is not there.
    missing = ["data=text", f"data.paths=[{scratch}/none.txt]", f"data.directory={scratch}/none", "name=never"]

    @drawn(examples, number)
    @given(st.lists(st.tuples(st.integers(len(PLACE), len(whole)), st.integers(0, 5), PIECES), min_size=1, max_size=3))
    def spoil(changes: list[tuple[int, int, bytes]]) -> None:
        content = whole
        for place, removed, piece in changes:
            content = content[:place] + piece + content[place + removed :]
        file.write_bytes(content)
        counts["tried"] += 1
        said = io.StringIO()
        given = [*missing, f"output_dir={scratch}/never", "train.compile=false", "launcher=local"]
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = main([f"--config-dir={scratch}/files", "experiment=mine", *given])
        except Exception as error:
            faults.append(f"{changes}: {type(error).__name__}: {error}")
            return
        if code == 2 and said.getvalue().startswith("error: ") and said.getvalue().count("\n") == 1:
            counts["refused"] += 1
        else:
            faults.append(f"{changes}: exit code {code}, {said.getvalue()!r}")

    spoil()
    return {**counts, "faults": faults}
