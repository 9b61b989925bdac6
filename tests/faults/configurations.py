"""Random configurations: a valid one builds and steps, a mutated one is valid or refused in one line.

Hypothesis draws a few for the tests and many for `make test-faults`. `step_configurations` and `mutate_configurations`
count the results and list the faults.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.training.runs import lines
from training.compose import CONFIG_DIRECTORY, compose_dictionary, validate
from training.config import ConfigurationError, RunConfig
from training.launching.command import main
from training.mistakes import known_keys
from training.run import execute

OPTIMIZERS = ("adamw", "lion", "sophiag", "sophiah", "muon", "signum", "adahessian")
SCHEDULES = ("cosine", "wsd", "constant")


def drawn(examples: int, number: int) -> Any:
    """Settings of a campaign: `examples` examples of a seed, no shrinking, no database."""

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
    if values["schedule="] == "constant":
        del values["schedule.final_ratio"]  # refused: it has no effect
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
    """Cache of the composition of each choice of groups: Hydra takes longer than the run."""

    def __init__(self, corpus: Sequence[str], output_dir: Path) -> None:
        self._corpus = list(corpus)
        self._output_dir = output_dir
        self._made: dict[str | None, dict[str, Any]] = {}

    def values(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """The plain values of a configuration, before validation."""
        values = copy.deepcopy(self._composed(None))
        for key, value in chosen.items():
            if key.endswith("="):
                group = key.removesuffix("=")
                values[group] = copy.deepcopy(self._composed(f"{key}{value}")[group])
        for key, value in chosen.items():
            if not key.endswith("="):
                *path, leaf = key.split(".")
                section = values
                for part in path:
                    section = section[part]
                section[leaf] = value
        values["seeds"] = dict.fromkeys(("model", "data", "curvature"), values["seed"])
        return values

    def _composed(self, choice: str | None) -> dict[str, Any]:
        if choice not in self._made:
            fixed = ["model=gpt2_nano", "train.compile=false", "train.device=cpu", f"output_dir={self._output_dir}"]
            self._made[choice] = compose_dictionary([*self._corpus, *fixed, "name=run", *filter(None, [choice])])
        return self._made[choice]


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
    """A valid configuration with one to three changes, and a description of the changes."""
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
    """Validate `examples` randomly mutated configurations: each is valid, or refused in one line without control codes."""
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
            line = f"error: {' '.join(str(error).split())}"  # as training.exits.refuse prints it
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
    """Check that a valid configuration has a name and a hash, and is the same when read back from a record."""
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
    """Give train.py `examples` random invalid command lines: exit code 2 and one line on standard error."""
    counts, faults = Counter[str](), list[str]()
    # A command line that happens to be valid fails at its missing corpus.
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


# A user's own files.
BROKEN_FILES: dict[str, bytes] = {
    "an open bracket": b"train:\n  steps: [1, 2\n",
    "a tab": b"train:\n\tsteps: 5\n",
    "a key twice": b"train:\n  steps: 5\n  steps: 6\n",
    "a section twice": b"train: {steps: 5}\ntrain: {steps: 6}\n",
    "an unknown tag": b"train: !python/object/apply:os.system ['true']\n",
    "another tag": b"train: {steps: !five 5}\n",
    "NUL": b"train: {steps: 5}\n\0\n",
    "not UTF-8": b"train: {steps: 5} # \xff\n",
    "a scalar": b"five\n",
    "a list": b"- train\n- steps\n",
    "a number": b"5\n",
    "a colon too few": b"train\n  steps: 5\n",
    "a colon too many": b"train: steps: 5\n",
    "a quote too few": b"name: 'run\n",
    "an unknown alias": b"train: *missing\n",
    "two documents": b"train: {steps: 5}\n---\ntrain: {steps: 6}\n",
    "an unknown key": b"train: {stpes: 5}\n",
    "an unknown section": b"trian: {steps: 5}\n",
    "an unknown choice": b"defaults:\n  - override /model: gpt3\n",
    "an unknown group": b"defaults:\n  - override /modle: gpt2_small\n",
    "itself": b"defaults:\n  - mine\n",
    "an unknown interpolation": b"train: {steps: '${train.stpes}'}\n",
    "an unknown resolver": b"train: {steps: '${eval:1}'}\n",
    "half an interpolation": b"train: {steps: '${train.steps'}\n",
    "a circle of interpolations": b"train: {steps: '${train.steps}'}\n",
    "a million aliases": b"".join(
        [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"]
        + [b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 8)]
    ),
    "nested without end": b"train: " + b"[" * 20_000 + b"]" * 20_000,
}

# Malicious content of other people's files.
FOREIGN_FILES: dict[str, str] = {
    "a module path": "hydra: {job: {env_set: {PYTHONPATH: /tmp/evil}}}",
    "a server for the key": "hydra: {job: {env_set: {WANDB_BASE_URL: 'http://127.0.0.1:9'}}}",
    "a preloaded library": "hydra: {job: {env_set: {LD_PRELOAD: /tmp/evil.so}}}",
    "a shell line": "launcher: {setup: ['touch /tmp/evil']}",
    "a comment of two lines": 'hydra: {launcher: {comment: "a\\ntouch /tmp/evil"}}',
    "a package of configurations": "hydra: {searchpath: ['pkg://antigravity']}",
    "a directory of configurations": "hydra: {searchpath: ['file:///tmp/evil']}",
    "a callback": "hydra: {callbacks: {x: {_target_: os.mkdir, path: /tmp/evil}}}",
    "a launcher": "hydra: {launcher: {_target_: os.mkdir}}",
    "a secret": "tracker: {group: '${oc.env:AWS_SECRET_ACCESS_KEY}'}",
    "a secret in a list": "tracker: {tags: ['${oc.decode:${oc.env:AWS_SECRET_ACCESS_KEY}}']}",
    "a secret in a name": "name: 'run-${oc.env:AWS_SECRET_ACCESS_KEY}'",
}


def break_files(scratch: Path, kinds: Mapping[str, bytes] = BROKEN_FILES) -> dict[str, Any]:
    """Compose with a broken file, as an experiment and as the primary file, for a run and for --cfg."""
    faults, tried = [], 0
    for kind, content in kinds.items():
        for mode in ("", "-m", "--cfg"):
            for primary in (False, True):
                place = scratch / f"{kind.replace(' ', '-')}-{mode}-{primary}"
                (place / "experiment").mkdir(parents=True)
                file = place / "mine.yaml" if primary else place / "experiment" / "mine.yaml"
                header = b"" if primary else b"# @package _global_\n"
                file.write_bytes(header + content)
                chosen = ["--config-name=mine"] if primary else ["experiment=mine"]
                shown = {"": [], "-m": ["-m"], "--cfg": ["--cfg", "job"]}[mode]
                tried += 1
                fault = _fault_of_line([*shown, f"--config-dir={place}", *chosen], scratch)
                faults += [f"{kind}, {mode or 'run'}, {file.relative_to(place)}: {fault}"] if fault else []
    return {"tried": tried, "refused": tried - len(faults), "faults": faults}


def refuse_foreign_files(scratch: Path, kinds: Mapping[str, str] = FOREIGN_FILES) -> dict[str, Any]:
    """Compose with a file that would run code, send keys elsewhere or record secrets."""
    secret = "wJalrXUtnFEMI-K7MDENG-bPxRfiCY"
    faults, tried = [], 0
    before, os.environ["AWS_SECRET_ACCESS_KEY"] = os.environ.get("AWS_SECRET_ACCESS_KEY"), secret
    environment = dict(os.environ)
    try:
        for kind, content in kinds.items():
            for mode in ("", "-m", "--cfg"):
                for package in ("# @package _global_\n", ""):
                    place = scratch / f"{kind.replace(' ', '-')}-{mode}-{bool(package)}"
                    (place / "experiment").mkdir(parents=True)
                    file = place / "experiment" / "mine.yaml"
                    if package:
                        file.write_text(package + content + "\n")
                    else:  # the package is named by whoever chooses the file
                        (place / "experiment" / "inner.yaml").write_text(content + "\n")
                        file.write_text("# @package _global_\ndefaults:\n  - inner@_global_\n")
                    shown = {"": [], "-m": ["-m"], "--cfg": ["--cfg", "job"]}[mode]
                    tried += 1
                    slurm = ["launcher=slurm"] if "launcher" in content else []
                    line = [*shown, f"--config-dir={place}", "experiment=mine", *slurm]
                    fault = _fault_of_line(line, scratch, secret)
                    if os.environ != environment:
                        fault = "the environment was changed"
                        os.environ.clear()
                        os.environ.update(environment)
                    faults += [f"{kind}, {mode or 'run'}, {package.strip() or 'inner'}: {fault}"] if fault else []
    finally:
        os.environ.pop("AWS_SECRET_ACCESS_KEY")
        if before is not None:
            os.environ["AWS_SECRET_ACCESS_KEY"] = before
    return {"tried": tried, "refused": tried - len(faults), "faults": faults}


# Values that must not become part of a path, and keys that do.
BAD_NAMES = (
    "../x",
    "/abs/x",
    "a/b",
    "..",
    ".",
    ".hidden",
    "<script>",
    "a'b",
    '"',
    "a\0b",
    "x" * 300,
    "a b\n",
    "-x",
    "javascript:x",
)
NAME_KEYS = ("name", "model.name", "data.name")


def refuse_names(scratch: Path) -> dict[str, Any]:
    """Names that would leave `output_dir` or `data.directory`, inject markup, or exceed a file system's limits."""
    faults, tried = [], 0
    inside = scratch / "a" / "b" / "c"
    inside.mkdir(parents=True)
    for key in NAME_KEYS:
        for bad in BAD_NAMES:
            tried += 1
            quoted = bad.replace("\\", "\\\\").replace("'", "\\'")
            line = [f"{key}='{quoted}'", f"output_dir={inside}/runs", f"data.directory={inside}/tokens"]
            fault = _fault_of_line(line, scratch)
            left = [str(path) for path in scratch.rglob("*") if path not in (inside, *inside.parents)]
            faults += [f"{key}={bad!r:.40}: {fault or left[:3]}"] if fault or left else []
    return {"tried": tried, "refused": tried - len(faults), "faults": faults}


def _fault_of_line(arguments: Sequence[str], scratch: Path, secret: str | None = None) -> str | None:
    """Return the fault in how an invalid command line was refused, or None."""
    said, shown = io.StringIO(), io.StringIO()
    missing = ["data=text", f"data.paths=[{scratch}/none.txt]", "train.compile=false"]
    missing += [] if any("output_dir=" in a for a in arguments) else [f"output_dir={scratch}/never"]
    missing += [] if any("data.directory=" in a for a in arguments) else [f"data.directory={scratch}/none"]
    began = time.monotonic()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
            code: Any = main([*missing, *arguments])
    except SystemExit as error:
        code = error.code
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    seconds, text = time.monotonic() - began, said.getvalue()
    if secret is not None and secret in text + shown.getvalue():
        return "the secret is shown"
    if seconds > 20:
        return f"took {seconds:.0f} s"
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code != 2 or len(errors) != 1 or "Traceback" in text:
        return f"exit code {code}: {text[:300]!r}"
    if "none.txt" in errors[0] or "SLURM" in errors[0]:
        return f"was taken: only a missing corpus or cluster is refused: {errors[0]}"
    if len(errors[0]) < 30 or "Exception" in errors[0] or "ConfigKeyError" in errors[0] or "=…" in errors[0]:
        return f"half a message: {errors[0]}"
    return None


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
    # A file that is still valid fails at its missing corpus.
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
