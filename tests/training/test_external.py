"""optimizer=external: trained, resumed, swept; refused in one line; and never imported from a file that nobody vouched for."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from analysis.runs import load_run
from analysis.trial_tables import TrialRow, checked
from models import GPT2, GPT2Config
from planning.memory import planned_memory
from studies.expansion import expand
from studies.spec import load_spec
from tests.training.reliability.test_resume import kill_before_recording
from tests.training.runs import curve, lines, run, run_in_child, tiny
from training import compose as composing
from training.compose import Primary, compose
from training.config import ConfigurationError
from training.distributed import Distributed
from training.launching.inputs import refuse_absent_inputs
from training.optimizers import build_optimizers
from training.records import RunRecord
from training.reliability.checkpoints import newest_valid
from training.strategies.ddp import DDP
from training.strategies.gradients import update_hessian

SHAPE = GPT2Config(vocab_size=61, n_layer=1, n_head=2, n_embd=16, block_size=12, bias=True)
#: A module of the current directory.
MINE = """
import torch

class Mine(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, weight_decay=0.0, momenta=(0.9, 0.99)):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momenta=momenta, steps=0))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                state = self.state[p]
                if "fast and/or slow" not in state and group["steps"] > 2:  # made lazily
                    state["fast and/or slow"] = [torch.zeros_like(p) for _ in group["momenta"]]
                for average, beta in zip(state.get("fast and/or slow", ()), group["momenta"]):
                    average.lerp_(p.grad, 1 - beta)
                    p.add_(average.sign(), alpha=-group["lr"] / 2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
        return "what nobody reads"

class Curved(Mine):
    folded = ()

    def update_hessian(self, num_predictions=None, estimates=None):
        self.folded += (num_predictions or estimates,)

class OnlyGroups(Mine):
    def __init__(self, params, lr):
        super(Mine, self).__init__(params, dict(lr=lr))

class Half(Mine):
    def __init__(self, params, lr, weight_decay):
        super().__init__(params[:1], lr, weight_decay)

class Shared(Mine):
    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr, weight_decay)
        self.param_groups.append(dict(self.param_groups[0]))

class WithoutRates(Mine):
    def __init__(self, named_parameters, lr, weight_decay):
        super().__init__([p for _, p in named_parameters], lr, weight_decay)
        del self.param_groups[0]["lr"]

def by_name(named_parameters, lr, weight_decay, scale):
    matrices = [p for name, p in named_parameters if name.endswith("weight") and p.dim() == 2]
    rest = [p for name, p in named_parameters if not (name.endswith("weight") and p.dim() == 2)]
    return Mine([dict(params=matrices, lr=lr * scale), dict(params=rest, weight_decay=0.0)], lr, weight_decay)

def nothing(params, lr, weight_decay):
    return None

number = 3
"""
ARMS = {
    "nadam": ["optimizer.factory=torch.optim:NAdam", "optimizer.arguments.betas=[0.9,0.98]"],
    "soap": ["optimizer.factory=pytorch_optimizer:SOAP", "optimizer.arguments={precondition_frequency: 3}"],
    "adamwschedulefree": ["optimizer.factory=schedulefree:AdamWScheduleFree", "schedule=constant"],
    "mine": ["optimizer.factory=mine:Mine", "optimizer.groups=matrices_apart", "optimizer.arguments.momenta=[0.9,0.5]"],
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with modules of its own."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "breaks.py").write_text("import nowhere_to_be_found")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def external(*overrides: str) -> list[str]:
    return ["optimizer=external", "optimizer.lr=0.01", *overrides]


def built(*overrides: str) -> Any:
    (optimizer,) = build_optimizers(compose(external(*overrides)).optimizer, compile_step=False)(parameters())
    return optimizer


def parameters() -> dict[str, torch.nn.Parameter]:
    return dict(GPT2(SHAPE).named_parameters())


def kill_here(directory: str, step: int) -> None:
    os.chdir(directory)
    kill_before_recording(step)


def final_tensors(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = newest_valid(directory / "checkpoints")
    assert checkpoint is not None
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


@pytest.mark.parametrize("arm", ARMS)
def test_a_killed_run_resumes_with_the_same_bits(corpus: list[str], here: Path, arm: str) -> None:
    overrides = external(*ARMS[arm])
    assert run(tiny(corpus, here, *overrides, name="undisturbed")) == 0
    killed = tiny(corpus, here, *overrides)
    assert run_in_child(killed, kill_here, str(here), 16) == -signal.SIGKILL
    assert run(killed) == 0
    assert curve(here / "run") == curve(here / "undisturbed")
    resumed, undisturbed = final_tensors(here / "run"), final_tensors(here / "undisturbed")
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    losses = [line["val_loss"] for line in lines(here / "run", "eval")]
    assert losses[-1] < losses[0] - 0.1
    assert load_run(here / "run").optimizer == compose(overrides).optimizer.label == arm


def test_a_checkpoint_of_another_factory_is_refused_by_name(
    corpus: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = ["train.steps=4", "checkpoint.interval=3"]
    assert run(tiny(corpus, here, *external(*ARMS["mine"]), *short, name="first")) == 0
    other = [*external(*ARMS["nadam"]), *short, f"resume={here}/first/checkpoints/step-00000003"]
    assert run(tiny(corpus, here, *other, name="second")) == 2
    said = capfd.readouterr().err
    assert "optimizer=external optimizer.factory=torch.optim:NAdam: " in said
    assert "has the state of optimizer=external optimizer.factory=mine:Mine; choose that" in said


SWEPT = {
    "nadam": ("betas", "[0.9,0.98],[0.8,0.98]"),
    "adamwschedulefree": ("r", "0.5,1.0"),
}


@pytest.mark.parametrize("arm", SWEPT)
def test_an_argument_is_swept_like_any_key_and_names_the_runs(corpus: list[str], here: Path, arm: str) -> None:
    key, values = SWEPT[arm]
    overrides = tiny(corpus, here, *external(*ARMS[arm]), "train.steps=3", f"optimizer.arguments.{key}={values}")
    assert run(["-m", *(override for override in overrides if not override.startswith("name="))]) == 0
    runs = [load_run(path) for path in here.iterdir() if (path / "summary.json").is_file()]
    found = [one.config["optimizer"]["arguments"][key] for one in runs]
    assert sorted(found) == sorted(yaml.safe_load(f"[{values}]"))
    assert all(f"-{arm}-" in one.name and one.completed for one in runs)


def test_a_search_space_names_elements_of_arguments(here: Path) -> None:
    arm = {"overrides": external(*ARMS["nadam"]), "search": {"optimizer.arguments.betas[0]": {"values": [0.8, 0.9]}}}
    spec = {
        "name": "mine",
        "baseline": "adamw",
        "base": ["data=sample"],
        "models": {"gpt2_nano": {"horizons": [50], "tune_at": 50, "seeds": [1]}},
        "tuning": {"seeds": [100], "method": "grid", "trials": 2},
        "arms": {"adamw": {"overrides": ["optimizer=adamw"]}, "nadam": arm},
    }
    (here / "mine.yaml").write_text(yaml.safe_dump(spec))
    trials = [trial for trial in expand(load_spec(str(here / "mine.yaml")), {}).trials if trial.arm == "nadam"]
    found = [compose(trial.overrides).optimizer.arguments["betas"] for trial in trials]  # type: ignore[union-attr]
    assert found == [[0.8, 0.98], [0.9, 0.98]]


REFUSED = {
    "no such module": (["torch.optm:NAdam"], "no module torch.optm; did you mean torch.optim?"),
    "no such package": (["pytorch_optimizr:SOAP"], "no module pytorch_optimizr; did you mean pytorch_optimizer?"),
    "no such file": (["absent:X"], "no module absent; install it, or start in the directory that holds it"),
    "no such name": (["torch.optim:NAdm"], "no NAdm in torch.optim; did you mean NAdam?"),
    "a broken import": (
        ["breaks:X"],
        "importing breaks fails: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    ),
    "not callable": (["mine:number"], "it is of type int; give a class or function"),
    "an unknown argument": (
        ["torch.optim:NAdam", "optimizer.arguments.epsilon=1"],
        "optimizer.arguments.epsilon=1: no argument of torch.optim:NAdam; it takes betas, eps, momentum_decay",
    ),
    "a misspelt one, although the signature takes any": (
        ["pytorch_optimizer:SOAP", "optimizer.arguments.beta=[0.9,0.9]"],
        "no argument of pytorch_optimizer:SOAP; did you mean betas? It takes betas, shampoo_beta",
    ),
    "the run's argument": (["torch.optim:NAdam", "optimizer.arguments.lr=1"], "the run gives it; set optimizer.lr="),
    "a missing argument": (["mine:by_name"], "its argument scale is missing; give optimizer.arguments.scale="),
    "a wrong value": (
        ["torch.optim:NAdam", "optimizer.arguments.betas=[2,3]"],
        "calling it fails: ValueError: Invalid beta",
    ),
    "no optimizer": (["mine:nothing"], "it returns a value of type NoneType; return a torch.optim.Optimizer"),
    "no decay": (["mine:OnlyGroups"], "mine:OnlyGroups takes no weight_decay; give optimizer.weight_decay=0"),
    "a parameter without a group": (["mine:Half"], "is in no group; put each parameter into one group"),
    "a parameter in two groups": (["mine:Shared"], "is in several groups; put each parameter into one group"),
    "a group without a rate": (["mine:WithoutRates"], "a group has no lr, which the schedule sets"),
    "groups that ignore a key": (
        ["mine:by_name", "optimizer.arguments.scale=1", "optimizer.embedding_lr_ratio=0.5"],
        "it forms groups of its own; give optimizer.embedding_lr_ratio=1",
    ),
    "LBFGS": (["torch.optim:LBFGS"], "its step needs closure, so it evaluates the loss several times per step"),
    "SAM": (
        ["pytorch_optimizer:SAM"],
        "it has first_step and second_step, so it evaluates the loss several times per step",
    ),
    "no curvature": (["mine:Mine", "optimizer.estimator=gnb"], "mine:Mine has no update_hessian(num_predictions=...)"),
    "no factory": (["null"], "optimizer.factory: missing; give the module and the callable"),
    "half a factory": (["torch.optim.NAdam"], "not a module and a callable; give the module and the callable"),
    "shards": (
        ["mine:Mine", "strategy=fsdp"],
        "shards of the parameters; choose strategy=ddp, or optimizer.elementwise=true",
    ),
    "flat and a rule": (
        ["mine:Mine", "optimizer.groups=flat", "optimizer.decay_embeddings=false"],
        "optimizer.decay_embeddings: has no effect with optimizer.groups=flat",
    ),
    "another's key": (
        ["mine:Mine", "optimizer.betas=[0,0]"],
        "takes arguments of its factory as optimizer.arguments.betas=",
    ),
    "an element of no list": (
        ["mine:Mine", "optimizer.arguments.momenta[0]=1"],
        "give all of it, 'optimizer.arguments.mom",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_in_one_line(case: str) -> None:
    (factory, *overrides), message = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        built(f"optimizer.factory={factory}", *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_factory_is_refused_before_the_ranks_start(corpus: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="did you mean NAdam"):
        refuse_absent_inputs(compose([*corpus, *external("optimizer.factory=torch.optim:NAdm")]))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("default", [(0.1, False), (0.0, False)]),
        ("matrices_apart", [(0.1, False), (0.1, True), (0.0, False)]),
        ("flat", [(0.1, False)]),
    ],
)
def test_the_factory_gets_the_parameters_in_groups(groups: str, expected: list[tuple[float, bool]]) -> None:
    optimizer = built("optimizer.factory=mine:Mine", f"optimizer.groups={groups}")
    assert [(g["weight_decay"], g.get("matrices", False)) for g in optimizer.param_groups] == expected
    for group in optimizer.param_groups:
        hidden = all(name.startswith("blocks.") and "norm" not in name for name in group["names"])
        assert group.get("matrices", False) == (hidden and all(p.dim() == 2 for p in group["params"]))


def test_a_factory_of_named_parameters_forms_groups_which_the_schedule_scales() -> None:
    optimizer = built("optimizer.factory=mine:by_name", "optimizer.arguments.scale=0.5")
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.005, 0.01]
    assert sorted(name for group in optimizer.param_groups for name in group["names"]) == sorted(parameters())


def test_sophia_from_outside_has_the_curve_of_the_built_in_one(corpus: list[str], here: Path) -> None:
    own = ["optimizer.lr=0.01", "optimizer.weight_decay=0.2", "train.steps=8"]
    assert run(tiny(corpus, here, "optimizer=sophiag", *own, name="built-in")) == 0
    brought = ["optimizer.factory=sophia:SophiaG", "optimizer.estimator=gnb", "optimizer.hessian_interval=5"]
    brought += ["optimizer.arguments={betas: [0.96, 0.99], gamma: 0.05, compile: false}"]
    assert run(tiny(corpus, here, "optimizer=external", *own, *brought, name="brought")) == 0
    assert curve(here / "brought") == curve(here / "built-in")


def test_a_curvature_pass_is_recorded_whatever_the_class_keeps(corpus: list[str], here: Path) -> None:
    overrides = external("optimizer.factory=mine:Curved", "optimizer.estimator=hutchinson", "train.steps=4")
    assert run(tiny(corpus, here, *overrides)) == 0
    (line,) = lines(here / "run", "hessian")
    assert line["held_back"] is False
    assert "hessian_norm" not in line


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_estimate_that_is_not_finite_never_reaches_a_class_without_the_amp_protocol(bad: float) -> None:
    optimizer = built("optimizer.factory=mine:Curved", "optimizer.estimator=hutchinson")
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    estimates = [torch.ones_like(p) for p in owned]
    assert not update_hessian([optimizer], owned, None, estimates)
    estimates[3][0] = bad
    assert update_hessian([optimizer], owned, None, estimates)
    assert len(optimizer.folded) == 1


class Weights:
    def apply(self, model: GPT2) -> None:
        model.initialize(0)


def test_an_evaluation_mode_uses_other_weights_and_leaves_those_of_training_bit_for_bit() -> None:
    strategy = DDP(Distributed(0, 0, 1, torch.device("cpu")), bf16=False, compile_model=False)
    with torch.device("meta"):
        model = GPT2(SHAPE)
    config = compose(external(*ARMS["adamwschedulefree"])).optimizer
    strategy.prepare(model, Weights(), build_optimizers(config, compile_step=False))  # type: ignore[arg-type]
    for step in range(4):
        for index, parameter in enumerate(strategy.parameters().values()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + index))
        strategy.step(1.0)
    before = [weight.clone() for weight in strategy.weights()]
    with strategy.evaluating():
        assert not any(map(torch.equal, strategy.weights(), before))
    assert all(map(torch.equal, strategy.weights(), before))
    assert strategy.optimizers[0].param_groups[0]["train_mode"]


FOREIGN = "optimizer: {factory: 'mine:Mine'}\nallow_code: true\n"


@pytest.mark.parametrize("how", ["--config-dir", "--config-path", "hydra.searchpath", "interpolated"])
def test_a_file_from_elsewhere_names_no_code_unless_the_command_line_allows_it(how: str, here: Path) -> None:
    (here / "experiment").mkdir()
    (here / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{FOREIGN}")
    (here / "theirs.yaml").write_text(f"defaults: [config, _self_]\n{FOREIGN}")
    overrides, primary = external("experiment=theirs"), Primary(added=here)
    if how == "--config-path":
        overrides, primary = external(), Primary("theirs", here)
    elif how == "hydra.searchpath":
        overrides, primary = [*overrides, f"hydra.searchpath=[file://{here}]"], Primary()
    elif how == "interpolated":
        overrides = [*overrides, "output_dir='mine:Mine'", "optimizer.factory=${output_dir}"]
    with pytest.raises(ConfigurationError, match=r"optimizer\.factory=mine:Mine: names code to run.*allow_code=true"):
        compose(overrides, primary)
    allowed = compose([*overrides, "allow_code=true"], primary)
    given = compose([*overrides, "optimizer.factory=mine:Mine"], primary)
    assert allowed.identity() == given.identity()


def test_the_projects_own_files_may_name_code(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "optimizer").mkdir()
    (here / "optimizer" / "arm.yaml").write_text("factory: mine:Mine\n")
    values = {"optimizer": {"factory": "mine:Mine"}}
    with pytest.raises(ConfigurationError, match="names code to run"):
        composing.refuse_foreign_code(values, [])
    monkeypatch.setattr(composing, "CONFIG_DIRECTORY", here)
    composing._own_code.cache_clear()
    composing.refuse_foreign_code(values, [])
    composing._own_code.cache_clear()


def test_a_record_is_rerun_only_if_the_command_line_allows_its_code(
    corpus: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = tiny(corpus, here, *external(ARMS["mine"][0]), "train.steps=3", "allow_code=true")
    assert run(command) == 0
    assert run(command[:-1]) == 0, "a run's own command needs no leave to resume"
    record = RunRecord.open(here / "run")
    assert "allow_code" not in record.config
    checked(TrialRow("run", "mine", "reporting", "gpt2_nano", 3, 0, record.config, record.environment, record.summary))
    again = ["--config-path", str(here / "run"), f"output_dir={here}/again"]
    assert run(again) == 2
    assert "names code to run, in a file from outside configs/" in capfd.readouterr().err
    assert run([*again, "allow_code=true"]) == 0
    assert curve(here / "again" / "run") == curve(here / "run")


def test_the_planner_measures_what_the_optimizer_keeps() -> None:
    base = ["model=gpt2_nano", "train.global_batch_size=4", "train.micro_batch_size=4", "train.compile=false"]
    base += ["train.precision=fp32", "train.sequence_length=64"]

    def state(*overrides: str) -> int:
        return planned_memory(compose([*base, *overrides]), SHAPE, 1, "cpu")["update"]["optimizer"]

    adamw = state("optimizer=adamw")
    assert state(*external(*ARMS["nadam"])) == adamw
    assert state(*external("optimizer.factory=torch.optim:SGD")) == 0
    soap = state(*external(*ARMS["soap"]))
    matrices = [p for p in parameters().values() if p.dim() == 2]
    assert soap == adamw + 4 * sum(2 * (side * side) for p in matrices for side in p.shape)
