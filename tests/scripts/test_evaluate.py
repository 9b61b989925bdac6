from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from downstream.evaluation import Metric, TaskResult, read_results, suite_mean, write_results
from downstream.export import export
from downstream.inference import TrainedModel
from scripts.evaluate import main

lm_eval = pytest.importorskip("lm_eval")

QUESTIONS = [
    {"query": f"the light of day {number} was", "choices": ["grey and", "nobody", "é of the"], "label": number % 3}
    for number in range(9)
]
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{train: {directory}/questions.jsonl, test: {directory}/questions.jsonl}}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
# A member of the harness's tag for SuperGLUE, that suites can be tested without its data.
SUITE_MEMBER = CHOICE.replace("task: choice", "task: member\ntag: super-glue-lm-eval-v1")
LAST_WORD = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/questions.jsonl}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: " {{{{choices[0]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
metadata: {{version: 2.0}}
"""
DEEP = "[" * 100_000 + "]" * 100_000
WITHOUT_DATA = "task: without_data\ndataset_path: nobody/nothing\noutput_type: loglikelihood\ntest_split: test\n"


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, content in (("choice", CHOICE), ("member", SUITE_MEMBER), ("last_word", LAST_WORD)):
        (directory / f"{name}.yaml").write_text(content.format(directory=directory))
    (directory / "without_data.yaml").write_text(WITHOUT_DATA)
    return directory


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def exported(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "model"
    export(trained, directory)
    return directory


@torch.no_grad()
def loglikelihood(trained: TrainedModel, context: str, continuation: str) -> float:
    """log p(continuation | context), tokenised as one text, in nats."""
    prefix = trained.tokenizer.encode(context).tolist()
    ids = trained.tokenizer.encode(context + continuation).tolist()
    assert ids[: len(prefix)] == prefix
    logarithms = trained.model.logits(torch.tensor([ids])).log_softmax(dim=-1)[0]
    return sum(float(logarithms[place - 1, ids[place]]) for place in range(len(prefix), len(ids)))


def test_the_harness_scores_the_models_own_likelihoods(
    trained: TrainedModel, tiny_run: Path, tasks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    command = [str(tiny_run), "--tasks", "choice,last_word", "--include-path", str(tasks), "--output", str(output)]
    assert main(command) == 0
    choice, last_word = read_results(output)
    assert (choice.task, last_word.task) == ("choice", "last_word")
    assert (choice.num_fewshot, choice.examples, choice.step, choice.suite) == (0, 9, 3, None)
    assert choice.prompts_cut == 0

    correct, nats = 0, 0.0
    for question in QUESTIONS:
        scores = [loglikelihood(trained, question["query"], f" {choice}") for choice in question["choices"]]
        correct += scores.index(max(scores)) == question["label"]
        nats -= scores[0]
    assert choice.metrics["acc"].value == pytest.approx(correct / 9)
    assert last_word.metrics["perplexity"].value == pytest.approx(math.exp(nats / 9), rel=1e-4)
    assert [choice.metrics["acc"].higher_is_better, last_word.metrics["perplexity"].higher_is_better] == [True, False]


def test_superglue_is_two_shot_unless_told_otherwise(
    exported: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(exported), "--tasks", "superglue,choice", "--include-path", str(tasks), "--limit", "4"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "superglue, mean of 1" in shown
    assert "12 prompts are longer than the model's context" in shown  # three choices for each of four questions
    results = {result.task: result for result in read_results(exported / "downstream.json")}
    assert (results["member"].suite, results["member"].num_fewshot, results["member"].examples) == ("superglue", 2, 4)
    assert results["choice"].num_fewshot == 0

    assert main([*command, "--num-fewshot", "1"]) == 0
    results = {(r.task, r.num_fewshot): r for r in read_results(exported / "downstream.json")}
    assert sorted(results) == [("choice", 0), ("choice", 1), ("member", 1), ("member", 2)]


def test_superglue_names_the_eight_tasks_of_the_installed_harness() -> None:
    from lm_eval.tasks import TaskManager

    from downstream.evaluation import SUITES

    installed = Path(lm_eval.__file__).parent / "tasks" / "super_glue"
    manager = TaskManager(include_path=str(installed), include_defaults=False)
    members = manager.task_index[SUITES["superglue"].harness_name].tags
    assert members == {"boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc"}


def test_an_unknown_task_is_refused_with_the_nearest_one(
    exported: Path, tasks: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    # The whole index takes many seconds to read.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    line = refused(main([str(exported), "--tasks", "choise", "--include-path", str(tasks)]))
    assert "choise: lm-eval has no such task; did you mean choice?" in line


def test_a_task_without_its_data_is_refused(exported: Path, tasks: Path, refused: Callable[[int], str]) -> None:
    line = refused(main([str(exported), "--tasks", "without_data", "--include-path", str(tasks)]))
    assert line.startswith("error: without_data: its data or its task file cannot be loaded")
    assert "HF_HOME" in line


def test_a_missing_harness_is_one_line(
    tiny_run: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    line = refused(main([str(tiny_run), "--tasks", "hellaswag"]))
    assert line == "error: lm-eval is not installed; install it with: pip install -e '.[evaluate]'"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([".", "--tasks", "choice"], "is not a run record"),
        (["tiny", "--tasks", ","], "no tasks"),
        (["tiny", "--tasks", "choice", "--num-fewshot", "-1"], "--num-fewshot -1"),
        (["tiny", "--tasks", "choice", "--limit", "0"], "--limit 0"),
        (
            ["tiny", "--tasks", "choice", "--include-path", "nowhere"],
            "no such directory; give a directory of task files",
        ),
        (["tiny", "--tasks", "choice", "--output", "tiny/summary.json"], "holds no downstream results"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    expected: str,
    tiny_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[int], str],
) -> None:
    monkeypatch.chdir(tiny_run.parent)
    assert expected in refused(main(arguments))


def test_pickled_weights_are_not_read(
    exported: Path, tasks: Path, tmp_path: Path, refused: Callable[[int], str]
) -> None:
    directory = tmp_path / "pickled"
    directory.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((exported / name).read_bytes())
    torch.save({}, directory / "pytorch_model.bin")
    line = refused(main([str(directory), "--tasks", "choice", "--include-path", str(tasks)]))
    assert "transformers cannot load a model from it" in line


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("config.json", lambda c: c | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map names code"),
        (
            "tokenizer_config.json",
            lambda c: c | {"auto_map": {"AutoTokenizer": ["evil.T", None]}},
            "auto_map names code",
        ),
        ("tokenizer.json", lambda c: DEEP, "transformers cannot load a model from it"),
        ("config.json", lambda c: DEEP, "transformers cannot load a model from it"),
    ],
)
def test_a_directory_that_names_code_or_cannot_be_read_is_one_line(
    name: str,
    change: Callable[[Any], Any],
    expected: str,
    exported: Path,
    tasks: Path,
    tmp_path: Path,
    refused: Callable[[int], str],
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(exported, directory)
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    changed = change(json.loads((directory / name).read_text()))
    (directory / name).write_text(changed if changed is DEEP else json.dumps(changed))
    assert expected in refused(main([str(directory), "--tasks", "choice", "--include-path", str(tasks)]))
    assert not (tmp_path / "exploded").exists()


def result(task: str, **metrics: Metric) -> TaskResult:
    return TaskResult(task, "superglue", 3, 2, 10, None, 0, "fp32", "1.0", "0.4.13", metrics)


def test_a_later_result_replaces_the_earlier_of_the_same_question_alone(tmp_path: Path) -> None:
    path = tmp_path / "made" / "results.json"
    first = result("a", acc=Metric(0.25, 0.1, True))
    others = [replace(first, step=4), replace(first, num_fewshot=0), replace(first, limit=5), replace(first, task="b")]
    write_results(path, [first, *others])
    later = replace(first, metrics={"acc": Metric(0.5, None, True), "nan": Metric(math.nan, None, None)})
    write_results(path, [later])
    found = read_results(path)
    assert len(found) == 5
    assert found[0].metrics == {"acc": Metric(0.5, None, True), "nan": Metric(None, None, None)}
    assert found[1:] == others


def test_the_mean_of_a_suite_is_over_tasks_and_not_over_examples() -> None:
    accuracy = result("a", acc=Metric(0.5, 0.03, True), f1=Metric(0.9, 0.1, True))
    only_f1 = result("record", f1=Metric(0.7, 0.04, True), em=Metric(0.1, 0.1, True))
    mean = suite_mean([accuracy, replace(only_f1, examples=10_000)])
    assert mean is not None
    assert mean.value == pytest.approx(0.6)
    assert mean.stderr == pytest.approx(0.05 / 2)
    assert suite_mean([accuracy, result("other", perplexity=Metric(3.0, None, False))]) is None
    assert suite_mean([]) is None
