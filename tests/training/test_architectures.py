"""model.architecture: a model that is no GPT-2 trains, resumes and is studied, and is refused in one line elsewhere."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.runs import load_run
from models import GPT2
from planning.cluster import compose_for, split_cluster
from scripts import export, sample
from studies.runner import run_study
from studies.spec import validate_spec
from studies.store import Places
from tests.training.reliability.test_resume import kill_before_recording
from tests.training.runs import curve, lines, run, run_in_child, summary, tiny
from training.architectures import build_model, forward_flops
from training.compose import Primary, compose, compose_dictionary, validate
from training.config import ConfigurationError, RunConfig
from training.exits import EXIT_PREEMPTED
from training.launching.inputs import refuse_absent_inputs
from training.optimizers import parameter_groups
from training.records import RunRecord
from training.strategies.precision import keep_norms_float32

ROTARY = "model.architecture=examples.my_model:Rotary"
#: A module of the current directory, with one mistake in each model.
MINE = """
import torch
from torch import nn
from examples.my_model import Rotary

class Buffered(Rotary):
    def __init__(self, **shape):
        super().__init__(**shape)
        self.register_buffer("angles", torch.ones(2))

class Tied(Rotary):
    def __init__(self, **shape):
        super().__init__(**shape)
        self.output_embedding = nn.Embedding(1, 1)
        self.output_embedding.weight = self.token_embedding.weight

class Strange(Rotary):
    def __init__(self, **shape):
        super().__init__(**shape)
        self.mixer = nn.Linear(2, 2)

class Unlisted(Rotary):
    def parameter_kind(self, name):
        return "ssm"

class Flat(Rotary):
    def __init__(self, **shape):
        super().__init__(**shape)
        del self.blocks

class Headless(Rotary):
    def __init__(self, **shape):
        super().__init__(**shape)
        del self.token_embedding

class Short(Rotary):
    @property
    def output_weight(self):
        return self.token_embedding.weight[1:]

class Swapped(Rotary):
    def __init__(self, vocab_size, block_size, **shape):
        super().__init__(vocab_size=block_size, block_size=vocab_size, **shape)

class Wide(Rotary):
    def hidden(self, tokens):
        return super().hidden(tokens).repeat(1, 1, 2)

def linear(vocab_size):
    return nn.Linear(2, vocab_size)

def broken(vocab_size):
    raise RuntimeError("no\\nthanks")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_models.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def rotary_run(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of 24 steps with Sophia-G, whose labels come from the training forward."""
    directory = tmp_path_factory.mktemp("rotary")
    assert run(tiny(corpus, directory, ROTARY)) == 0
    return directory / "run"


def test_a_run_learns_and_records_its_own_size_flops_and_kinds(rotary_run: Path) -> None:
    found, recorded = summary(rotary_run), load_run(rotary_run)
    losses = [line["val_loss"] for line in lines(rotary_run, "eval")]
    assert losses[-1] < losses[0] - 0.3
    assert recorded.model == "rotary_nano"
    assert found["shared_forwards"] == found["ledger"]["curvature"]["count"] == 5
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * round(32 * 8 / 3))
    assert found["parameters"] == matrices + 300 * 32 + 5 * 32
    trunk, head = 2 * matrices + 2 * 4 * 16 * 32, 2 * 300 * 32
    assert found["ledger"]["forward_backward"]["flops"] == 24 * 8 * 16 * 3 * (trunk + head)
    assert found["ledger"]["curvature"]["flops"] == 5 * 4 * 16 * 2 * trunk
    assert all([*line["by_kind"]] == ["embedding", "attention", "mlp", "norm"] for line in lines(rotary_run, "hessian"))


def test_a_killed_run_resumes_with_the_same_curve(corpus: list[str], tmp_path: Path, rotary_run: Path) -> None:
    killed = tiny(corpus, tmp_path, ROTARY)
    assert run_in_child(killed, kill_before_recording, 16) == -signal.SIGKILL
    assert run(killed) == 0
    assert curve(tmp_path / "run") == curve(rotary_run)


def test_labels_of_a_forward_of_their_own_give_the_same_curve(
    corpus: list[str], tmp_path: Path, rotary_run: Path
) -> None:
    assert run(tiny(corpus, tmp_path, ROTARY, "train.shared_forward=false", "train.steps=24")) == 0
    own, shared = ([line["loss"] for line in lines(directory, "train")] for directory in (tmp_path / "run", rotary_run))
    assert own == pytest.approx(shared, abs=1e-4)
    assert summary(tmp_path / "run")["shared_forwards"] == 0


def test_hutchinson_differentiates_it_twice(corpus: list[str], tmp_path: Path) -> None:
    overrides = ["optimizer=sophiah", "optimizer.estimator=hutchinson", "train.steps=3"]
    assert run(tiny(corpus, tmp_path, ROTARY, *overrides)) == 0
    (line,) = lines(tmp_path / "run", "hessian")
    assert line["by_kind"]["attention"]["hessian_norm"] > 0
    assert not line["held_back"]


def test_a_study_runs_a_trial_of_it(corpus: list[str], tmp_path: Path) -> None:
    settings = tiny(corpus, tmp_path, ROTARY, "model.arguments.expansion=2", "train.steps=3")
    ours = ("name=", "output_dir=", "model=", "optimizer", "train.steps=", "schedule.")
    spec = {
        "name": "mine",
        "baseline": "adamw",
        "base": [one for one in settings if not one.startswith(ours)],
        "models": {"gpt2_nano": {"horizons": [3], "tune_at": 3, "seeds": [1]}},
        "tuning": {"seeds": [100], "method": "grid", "trials": 2},
        "arms": {
            "adamw": {"overrides": ["optimizer=adamw"], "search": {"optimizer.lr": {"values": [1e-3, 2e-3]}}},
        },
    }
    places = Places.of("mine", tmp_path / "runs", tmp_path / "results")
    codes: list[int] = []

    def launch(jobs: Sequence[Sequence[str]]) -> list[int]:
        codes.extend([EXIT_PREEMPTED if codes else run(job) for job in jobs])
        return codes[-len(jobs) :]

    sitting = run_study(validate_spec(spec, "mine.yaml"), places, launch, log=lambda _: None)
    assert (sitting.ran, sitting.failed) == (1, ())
    assert "examples.my_model:Rotary" in (tmp_path / "results" / "mine" / "trials.csv").read_text()


def test_it_is_sampled_only_with_leave_and_never_exported(
    rotary_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = [str(rotary_run), "--prompt", "the light", "--tokens", "3"]
    for main, arguments in (sample.main, command), (export.main, [str(rotary_run), str(tmp_path / "exported")]):
        code = main(arguments)
        said = capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1)
        assert f"{ROTARY}: " in said
        assert "is no GPT-2, so scripts/export.py and scripts/evaluate.py cannot use it" in said
        assert "scripts/sample.py runs it with --allow-code" in said
    assert not (tmp_path / "exported").exists()
    assert sample.main([*command, "--allow-code"]) == 0
    assert capsys.readouterr().out.startswith("the light")


def test_the_planner_refuses_it() -> None:
    cluster, overrides = split_cluster([ROTARY, "cluster.gpus=2"])
    with pytest.raises(
        ConfigurationError, match=r"my_model:Rotary: the planner knows the memory of GPT-2 only; train a"
    ):
        compose_for(overrides, cluster)


def built(values: dict[str, Any], **given: Any) -> None:
    model = validate(values | {"model": values["model"] | given}).model
    forward_flops(model, build_model(model, 61), 8)


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return compose_dictionary(["model=gpt2_nano", ROTARY])


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"architecture": "rotary"},
        "not gpt2, and not a module and a callable; give both, such as model.architecture=examp",
    ),
    ({"architecture": "examples.my_model:Rotry"}, "no Rotry in examples.my_model; did you mean Rotary?"),
    (
        {"arguments": {"expansions": 2}},
        "no argument of examples.my_model:Rotary; did you mean expansion? It takes expansion",
    ),
    ({"arguments": {"n_embd": 2}}, "model.arguments.n_embd=2: the run gives it; set model.n_embd="),
    ({"dropout": 0.1}, "model.dropout=0.1: examples.my_model:Rotary takes no dropout; give model.dropout=0.0"),
    (
        {"architecture": "gpt2", "arguments": {"a": 2}},
        "model.architecture=gpt2 takes no arguments; set the keys of its",
    ),
    (
        {"init_from": "x"},
        "model.init_from=x: GPT-2 weights, which model.architecture=examples.my_model:Rotary cannot start",
    ),
]
LACKING = {
    "broken": "calling it fails: RuntimeError: no thanks; correct it or model.arguments",
    "linear": "it returns a value of type Linear; return a models.LanguageModel",
    "Swapped": "its model has vocab_size=256; hand the given one, 61, to LanguageModel.__init__",
    "Flat": "its model has no blocks; keep its layers in a torch.nn.ModuleList of that name",
    "Headless": "its model has no output layer",
    "Short": "output_weight has the shape (60, 64); give it at least 61 rows",
    "Tied": "output_embedding.weight and token_embedding.weight are one tensor; keep one of them",
    "Buffered": "the value of its buffer angles is lost on the meta device; compute it in the forward pass",
    "Strange": "the parameter mixer.weight has no kind; expected a name such as",
    "Unlisted": "parameter_kind('token_embedding.weight') returns 'ssm'; return one of kinds, embedding, attention, mlp, norm",
    "Wide": "hidden returns the shape (1, 8, 128) for tokens of (1, 8); the output layer takes (1, 8, 64); correct it",
}


@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_a_mistake_is_refused_in_one_line(given: dict[str, Any], message: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        built(values, **given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_exports_during_a_run_are_refused(values: dict[str, Any]) -> None:
    exporting = values | {"checkpoint": values["checkpoint"] | {"export_at": [2]}}
    with pytest.raises(ConfigurationError, match=r"checkpoint.export_at=\[2\]: transformers has no class for"):
        validate(exporting)


@pytest.mark.parametrize("name", LACKING)
def test_a_model_that_lacks_something_is_refused_in_one_line(name: str, here: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        built(values, architecture=f"own_models:{name}")
    assert str(caught.value).startswith(f"model.architecture=own_models:{name}: ")
    assert LACKING[name] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_architecture_is_refused_before_the_ranks_start(corpus: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="did you mean Rotary"):
        refuse_absent_inputs(compose([*corpus, "model.architecture=examples.my_model:Rotry"]))


def test_a_file_from_elsewhere_names_no_architecture_unless_the_command_line_allows_it(here: Path) -> None:
    (here / "model").mkdir()
    shape = "{name: theirs, n_layer: 1, n_head: 1, n_embd: 8, architecture: 'own_models:Flat'}"
    (here / "model" / "theirs.yaml").write_text(shape)
    primary = Primary(added=here)
    with pytest.raises(
        ConfigurationError, match=r"model\.architecture=own_models:Flat: names code to run.*allow_code="
    ):
        compose(["model=theirs"], primary)
    assert compose(["model=theirs", "allow_code=true"], primary).model.architecture == "own_models:Flat"
    assert compose(["model=theirs", "model.architecture=gpt2"], primary).model.is_gpt2


def test_records_of_gpt2_are_as_before_the_key_and_those_of_others_hold_it(rotary_run: Path) -> None:
    plain, named = compose(["model=gpt2_nano"]), compose(["model=gpt2_nano", "model.architecture=gpt2"])
    assert "architecture" not in plain.identity()["model"]
    assert plain.run_name == named.run_name
    assert isinstance(build_model(plain.model, 61), GPT2)
    held: Any = RunRecord.open(rotary_run).config
    assert held["model"]["architecture"] == "examples.my_model:Rotary"
    assert RunConfig.model_validate(held).model.name == "rotary_nano"


def test_the_models_kinds_decide_which_parameters_have_the_embeddings_rate() -> None:
    kinds = {"unembed.weight": "embedding", "blocks.0.mixer.weight": "ssm"}
    groups = parameter_groups({name: torch.ones(2, 2) for name in kinds}, 0.1, 1.0, 0.5, kind_of=kinds.__getitem__)
    assert {group["names"][0]: group["lr"] for group in groups} == {"unembed.weight": 0.5, "blocks.0.mixer.weight": 1.0}


def test_bf16_weights_of_an_rms_norm_are_computed_with_in_float32() -> None:
    norm = torch.nn.RMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    x = 100 * torch.randn(4, 16)
    narrow = torch.nn.RMSNorm(16, dtype=torch.bfloat16)
    narrow.load_state_dict(norm.state_dict())
    norm.load_state_dict(narrow.state_dict())
    keep_norms_float32(narrow)  # type: ignore[arg-type]
    torch.testing.assert_close(narrow(x), norm(x), rtol=0, atol=0)
