"""Downstream tasks: EleutherAI's lm-evaluation-harness on an exported model (downstream/export.py).

The harness supplies tasks, prompts and metrics. This module names the paper's tasks, sets the number of examples in the
prompt and converts the results to plain values. Only this module imports lm-eval.
"""

import contextlib
import difflib
import importlib.util
import json
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from data.files import problem, read_json, write_atomically
from downstream.export import TRAINING_FILE
from training.config import ConfigurationError
from training.records import RecordError, json_line

RESULTS_FILE = "downstream.json"
FORMAT = "sophia-downstream-1"
BOOTSTRAP_SAMPLES = 1000  # for standard errors without a formula; makes them accurate to about 2 percent


@dataclass(frozen=True)
class Suite:
    """Several of the harness's tasks under one name, and the default number of examples in their prompts."""

    harness_name: str
    num_fewshot: int


#: The paper's few-shot evaluation is on SuperGLUE, with two examples in the prompt.
SUITES = {"superglue": Suite("super-glue-lm-eval-v1", num_fewshot=2)}


@dataclass(frozen=True)
class Metric:
    value: float | None  # None: not finite, or not a number
    stderr: float | None  # None if the harness gives none
    higher_is_better: bool | None


_RESULTS_BYTES = 64 << 20


@dataclass(frozen=True)
class TaskResult:
    """The result of one task, with all settings that affect it."""

    task: str
    suite: str | None  # of SUITES
    step: int | None  # the model's number of updates; None for a model not trained here
    num_fewshot: int
    examples: int  # evaluated
    limit: int | None  # the most examples to evaluate; None: all
    seed: int  # of the choice of the prompts' examples
    precision: str
    version: str  # of the task
    lm_eval: str  # of the harness
    metrics: dict[str, Metric]
    # Prompts of all tasks evaluated together that are longer than the model's context; None in earlier files.
    prompts_cut: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """A later result with the same key replaces an earlier one."""
        return self.task, self.step, self.num_fewshot, self.limit, self.seed, self.precision


def require_harness() -> None:
    """Raise ConfigurationError, with the remedy, if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigurationError("lm-eval is not installed; install it with: pip install -e '.[evaluate]'")


def evaluate(
    directory: Path,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 1234,
    device: str = "cpu",
    precision: str = "fp32",
    include_path: Path | None = None,
) -> list[TaskResult]:
    """Run tasks on the model of a Hugging Face directory.

    Args:
        directory: a local directory with safetensors and a tokenizer, as `export` writes it.
        tasks: names of SUITES, or of the harness's tasks, tags and groups.
        num_fewshot: examples in each prompt; None for the suite's or the task's own number. A task that requires zero
            keeps it.
        limit: the most examples of each task, for a trial.
        batch_size: prompts per forward pass.
        seed: chooses the prompts' examples; use the same for two models to pair their comparison.
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16", of weights and computation.
        include_path: a directory of additional task files. Its YAML may name Python functions beside it, which are run.

    Raises:
        ConfigurationError: lm-eval is missing, a task is unknown or lacks its data, or the directory has no model.
    """
    require_harness()
    with _quiet_harness() as cut:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        model, tokenizer = _load_model(directory, precision, device)
        loaded, suites = _load_tasks(tasks, include_path)
        for name, task in loaded["tasks"].items():
            _set_examples(task, SUITES[suites[name]].num_fewshot if name in suites else None, num_fewshot)
            task.set_fewshot_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - some tasks draw from it
        torch.manual_seed(seed)
        try:
            # Not simple_evaluate, which also spends a minute listing the machine's packages.
            outcome = lm_eval.evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                loaded,
                limit=limit,
                bootstrap_iters=BOOTSTRAP_SAMPLES,
                log_samples=False,
            )
        except (ValueError, AssertionError) as error:  # too few examples for the prompts, tasks that run code, images
            raise ConfigurationError(f"lm-eval cannot run {', '.join(tasks)}: {error}") from error
    assert outcome is not None  # None on ranks other than 0, and there is one
    step = _step_of(directory)
    return [
        TaskResult(
            task=name,
            suite=suites.get(name),
            step=step,
            num_fewshot=outcome["n-shot"].get(name, 0),
            examples=outcome["n-samples"][name]["effective"],
            limit=limit,
            seed=seed,
            precision=precision,
            version=str(outcome["versions"].get(name)),
            lm_eval=lm_eval.__version__,
            metrics=_metrics(values, outcome["higher_is_better"].get(name, {})),
            prompts_cut=cut.prompts,
        )
        for name, values in outcome["results"].items()
        if name in outcome["n-samples"]
    ]


def _set_examples(task: Any, of_suite: int | None, given: int | None) -> None:
    """Set the number of examples in the task's prompts: as given, else its suite's, else its own, else 0."""
    own = task.get_config("num_fewshot")
    if own == 0:  # the task requires zero, as in lm-eval itself
        return
    number = given if given is not None else of_suite if of_suite is not None else own
    task.set_config("num_fewshot", 0 if number is None else number)


def _load_tasks(names: Sequence[str], include_path: Path | None) -> tuple[Any, dict[str, str]]:
    """The harness's TaskDict with the tasks' data, and the suite of each task that comes from one."""
    if not names:
        raise ConfigurationError("no tasks: name some, for example hellaswag,lambada_openai,superglue")
    if include_path is not None and not include_path.is_dir():
        raise ConfigurationError(f"--include-path {include_path}: no such directory; give a directory of task files")
    manager = _index(names, include_path)
    chosen: dict[str, Any] = {}
    suites: dict[str, str] = {}
    for name in names:
        known_as = SUITES[name].harness_name if name in SUITES else name
        try:
            loaded = manager.load([known_as])
        except Exception as error:  # datasets, the hub and a task's own code raise anything
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigurationError(
                f"{name}: its data or its task file cannot be loaded ({reason}); the harness downloads data from the "
                "Hugging Face hub once and keeps it in HF_HOME: run it once with a network, or name local task files "
                "with --include-path"
            ) from error
        groups = loaded.get("groups", {})
        for key, value in ({known_as: groups[known_as]} if known_as in groups else loaded["tasks"]).items():
            chosen.setdefault(key, value)
            if name in SUITES:
                suites[key] = name
    return manager.load(list(chosen.values())), suites


def _index(names: Sequence[str], include_path: Path | None) -> Any:
    """The harness's index of tasks: only the given directory if that suffices, since reading all tasks is slow."""
    from lm_eval.tasks import TaskManager

    wanted = [SUITES[name].harness_name if name in SUITES else name for name in names]
    if include_path is not None:
        local = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(wanted) <= set(local.all_tasks):
            return local
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, [*SUITES, *sorted(known)], n=1)
            remedy = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists the known ones"
            raise ConfigurationError(f"{name}: lm-eval has no such task; {remedy}")
    return manager


def _load_model(directory: Path, precision: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        _refuse_code(directory)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
        )
        model.to(device)  # type: ignore[arg-type]
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except ConfigurationError:
        raise
    except Exception as error:  # damaged directories raise exceptions of many libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"{directory}: transformers cannot load a model from it ({reason}); give a run or an exported directory"
        ) from error
    return model.eval(), tokenizer


def _refuse_code(directory: Path) -> None:
    """Refuse custom code, in whose place transformers would load a class of its own without a word, or none.

    Raises:
        ConfigurationError: a file of the directory names code to run with the model.
    """
    for path in (directory / "config.json", directory / "tokenizer_config.json"):
        if path.is_file() and "auto_map" in read_json(path, _RESULTS_BYTES):
            raise ConfigurationError(
                f"{path}: auto_map names code that would be run; remove it if transformers has the model's class"
            )


class _Cut(logging.Filter):
    """Counts the harness's warnings about prompts that are cut from the left, and lets only errors pass."""

    prompts = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.prompts += "exceeds model's maximum length" in record.getMessage()
        return record.levelno >= logging.ERROR


@contextlib.contextmanager
def _quiet_harness() -> Iterator[_Cut]:
    """Show only the harness's errors, and redirect what it prints to standard error."""
    logger, of_models, cut = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.models.huggingface"), _Cut()
    levels = logger.level, of_models.level
    logger.setLevel(logging.ERROR)
    of_models.setLevel(logging.WARNING)
    of_models.addFilter(cut)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield cut
    finally:
        of_models.removeFilter(cut)
        for one, level in zip((logger, of_models), levels, strict=True):
            one.setLevel(level)


def _metrics(values: dict[str, Any], higher_is_better: dict[str, bool | None]) -> dict[str, Metric]:
    """Merge the harness's `acc,none` and `acc_stderr,none` into one metric `acc`; keep the name of a filter."""
    metrics = {}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        stderr = values.get(f"{name}_stderr,{filtered}")
        metrics[name if filtered == "none" else key] = Metric(
            value=float(value) if isinstance(value, (int, float)) else None,
            stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
            higher_is_better=higher_is_better.get(name),
        )
    return metrics


def _step_of(directory: Path) -> int | None:
    try:
        return int(read_json(directory / TRAINING_FILE, _RESULTS_BYTES)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_results(path: Path) -> list[TaskResult]:
    """The results in a file; empty if there is no file. Raises RecordError if it is not a file of results."""
    try:
        content = read_json(path, _RESULTS_BYTES)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not {FORMAT!r}")
        return TypeAdapter(list[TaskResult]).validate_python(content["results"])
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}; name another file with --output") from error
    except (ValueError, KeyError, TypeError) as error:
        said = problem(error) if isinstance(error, ValueError) else repr(error)
        raise RecordError(f"{path} holds no downstream results ({said}); name another file with --output") from error


def write_results(path: Path, results: Sequence[TaskResult]) -> None:
    """Add results to a file, replacing those with the same key.

    Raises:
        RecordError: the file is not a file of results, or cannot be written.
    """
    merged = {result.key: result for result in [*read_results(path), *results]}
    entries = [json.loads(json_line(asdict(result))) for result in merged.values()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": FORMAT, "results": entries}, indent=1) + "\n")
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error.strerror}; name another file with --output") from error


def suite_mean(results: Sequence[TaskResult]) -> Metric | None:
    """The plain mean over a suite's tasks of accuracy, or of F1 for a task without accuracy (ReCoRD).

    None if a task has neither. The standard error assumes independent tasks.
    """
    scores = [result.metrics.get("acc", result.metrics.get("f1")) for result in results]
    values = [score.value for score in scores if score is not None and score.value is not None]
    errors = [score.stderr for score in scores if score is not None and score.stderr is not None]
    if not results or len(values) < len(results):
        return None
    count = len(results)
    stderr = sum(error**2 for error in errors) ** 0.5 / count if len(errors) == count else None
    return Metric(sum(values) / count, stderr, higher_is_better=True)
