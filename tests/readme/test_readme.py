"""README works as written: its commands on a fresh clone, in order and in one shell, and its Python code."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TINY = (
    "model=gpt2_nano train.steps=2 train.global_batch_size=4 train.sequence_length=32 train.compile=false "
    "train.device=cpu eval.interval=2 eval.tokens=64"
)
#: What the test runs for each command of README; {} is the command itself. A new command needs a line here.
COMMANDS = {
    "make setup && . .venv/bin/activate": ". .venv/bin/activate",
    "python train.py optimizer=sophiag": f"{{}} {TINY}",
    "torchrun --nproc_per_node=8 train.py optimizer=lion": (
        f"torchrun --standalone --nproc_per_node=2 train.py optimizer=lion {TINY}"
    ),
    "python train.py --help": "{}",
    "make demo": "{} --dry-run",
    "make test": "{} --dry-run",
    ". .venv/bin/activate": "{}",
    "python scripts/prepare_data.py data=openwebtext": "{} data.local=hub --workers 1",
    "python train.py launcher.nproc_per_node=8 experiment=paper/125m_sophiag tracker=wandb": (
        "python train.py launcher.nproc_per_node=1 experiment=paper/125m_sophiag tracker=wandb "
        f"{TINY} train.micro_batch_size=1 schedule.warmup_steps=1 data.local=hub"
    ),
    "python train.py -m output_dir=runs/sweep optimizer=adamw,lion,sophiag optimizer.lr=3e-4,6e-4,1.2e-3 seed=0,1,2": (
        f"python train.py -m output_dir=runs/sweep optimizer=adamw,sophiag optimizer.lr=3e-4 seed=0 {TINY}"
    ),
    "python scripts/compare.py runs/sweep/*": "{}",
    "python scripts/study.py run study=smoke": "{}",  # with the study of `write_small_study`
    "python scripts/report.py results/smoke": "{}",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command of README's shell blocks, without its comment."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    return [command for line in lines if (command := re.sub(r"(^|\s+)#.*", "", line).strip())]


def test_each_command_of_readme_has_a_line_here_and_each_line_a_command() -> None:
    assert commands() == list(COMMANDS)
    assert all(re.fullmatch(r"```(bash|python)?", line) for line in README.splitlines() if line.startswith("```"))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git would clone, with a .venv that points to this environment and a stand-in for OpenWebText."""
    clone = tmp_path / "clone"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    activate = clone / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    shard = clone / "hub" / "plain_text" / "0.parquet"
    shard.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": [f"Document {number}. " * 20 for number in range(2500)]}), shard)
    write_small_study(clone / "configs" / "study" / "smoke.yaml")
    return clone


def write_small_study(path: Path) -> None:
    """The same study with fewer and shorter runs."""
    study: dict[str, Any] = yaml.safe_load(path.read_text())
    study["base"] = [
        one for one in study["base"] if not one.startswith("tokenizer")
    ]  # an earlier command prepared GPT-2's
    study["base"] += ["train.global_batch_size=2", "train.sequence_length=16", "eval.interval=2", "eval.tokens=64"]
    study["models"]["gpt2_nano"] |= {"horizons": [2], "tune_at": 2, "seeds": [1]}
    study["tuning"] |= {"trials": 1, "retune": {"keys": ["optimizer.lr"], "trials": 1}}
    for arm in study["arms"].values():
        arm["search"] = {"optimizer.lr": {"values": [2e-3]}}
    del study["ablations"]
    path.write_text(yaml.safe_dump(study, sort_keys=False))


@pytest.mark.timeout(900)
def test_the_commands_of_readme_work_in_order_on_a_fresh_clone(clone: Path) -> None:
    """One shell runs them all. Its PATH has no Python environment until a command of README activates one."""
    here = {str(Path(sys.executable).parent), str(Path(sys.prefix) / "bin")}
    path = [place for place in os.environ["PATH"].split(":") if place not in here]
    script = ["set -eo pipefail"]
    for command, run in COMMANDS.items():
        script += [f"echo {shlex.quote(command)} >> done.txt", run.replace("{}", command)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=clone,
        env={**environment, "PATH": ":".join(path), "HOME": str(clone.parent), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = (clone / "done.txt").read_text().splitlines()[-1]
    assert ended.returncode == 0, f"{last}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    for left in ("runs/sweep/comparison.png", "results/smoke/report.html", "tokens/openwebtext-gpt2/manifest.json"):
        assert (clone / left).is_file(), left
    statuses = [path.read_text() for path in clone.glob("runs/*/summary.json")]
    assert len(statuses) == 3
    assert all('"completed"' in status for status in statuses)
    assert len([*clone.glob("runs/sweep/*/summary.json")]) == 2


def test_the_python_of_readme_trains_a_model() -> None:
    (code,) = blocks("python")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 16), torch.nn.Linear(16, 11))
    tokens = torch.randint(11, (4, 8))

    def loss() -> float:
        return torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).item()

    before = loss()
    names: dict[str, Any] = {"model": model, "batches": [(tokens, tokens)] * 30}
    exec(code, names)
    assert loss() < before - 0.05
    assert all(names["optimizer"].state[parameter]["hessian"].any() for parameter in model.parameters())
