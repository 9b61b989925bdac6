"""Each engine starts a saved run again, ends a refused one, and runs a command that train.py accepts."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import study
from training.compose import compose, compose_dictionary
from training.config import ConfigurationError, LocalLauncherConfig
from training.exits import EXIT_CONFIGURATION, EXIT_DIVERGED, EXIT_FAILED, EXIT_HELD, EXIT_PREEMPTED
from training.launching.command import main
from training.launching.ranks import SAVING_SECONDS
from training.mistakes import group_options

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = ROOT / "scripts" / "cluster"
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$0.arguments"
trap 'exit 75' USR1
for _ in $(seq "${WAIT:-0}"); do sleep 0.05; done
exit "${CODE:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node-1\\nnode-2\\n'; else echo "$@" >>"$0.requeued"; fi
"""


def start_batch(directory: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start slurm.sbatch with commands in place of SLURM's."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "50007", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-[1-2]"}
    job |= {"SLURM_SUBMIT_DIR": str(directory), "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96"}
    path = {"PATH": f"{directory}:{os.environ['PATH']}"}
    command = ["bash", str(CLUSTER / "slurm.sbatch"), "seed=1", "name=a b"]
    return subprocess.Popen(command, env=job | path | environment, stderr=subprocess.DEVNULL)


def batch(directory: Path, **environment: str) -> tuple[list[str], bool]:
    """Run slurm.sbatch; return srun's arguments, and whether the job was requeued."""
    code = start_batch(directory, **environment).wait(20)
    assert code == int(environment.get("CODE", 0))
    return (directory / "srun.arguments").read_text().splitlines(), (directory / "scontrol.requeued").exists()


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, False),
        (EXIT_FAILED, 0, True),
        (EXIT_FAILED, 20, False),
        (EXIT_CONFIGURATION, 0, False),
        (EXIT_DIVERGED, 0, False),
        (EXIT_HELD, 0, False),
        (EXIT_PREEMPTED, 0, True),
        (137, 19, True),
    ],
)
def test_the_sbatch_script_requeues_a_saved_or_failed_run_and_no_other(
    tmp_path: Path, code: int, restarts: int, requeued: bool
) -> None:
    assert batch(tmp_path, CODE=str(code), SLURM_RESTART_COUNT=str(restarts))[1] is requeued


def traps(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("number", "shortest", "restarts", "requeued"),
    [
        (signal.SIGUSR1, 0, 99, True),
        (signal.SIGUSR1, 600, 19, True),
        (signal.SIGUSR1, 600, 20, False),  # a time limit too short for a step
        (signal.SIGTERM, 0, 0, False),
    ],
)
def test_the_sbatch_script_requeues_at_its_time_limit_and_not_after_scancel(
    tmp_path: Path, number: signal.Signals, shortest: int, restarts: int, requeued: bool
) -> None:
    settings = {"SHORTEST": str(shortest), "SLURM_RESTART_COUNT": str(restarts), "CODE": str(EXIT_PREEMPTED)}
    script = start_batch(tmp_path, WAIT="400" if number == signal.SIGUSR1 else "10", **settings)
    until = time.monotonic() + 20
    while not ((tmp_path / "srun.arguments").exists() and traps(script.pid, number)):
        assert time.monotonic() < until
        time.sleep(0.02)
    script.send_signal(number)
    assert script.wait(20) == EXIT_PREEMPTED
    assert (tmp_path / "scontrol.requeued").exists() is requeued


def test_the_sbatch_script_gives_each_node_its_cpus_and_a_valid_command(tmp_path: Path) -> None:
    arguments, _ = batch(tmp_path)
    assert {"--cpus-per-task=96", "--kill-on-bad-exit=0", "train.device=cuda"} <= set(arguments)
    overrides = arguments[arguments.index("train.py") + 1 :]
    assert overrides[-1] == "name=a b"
    launcher = compose([*overrides[:-1], "train.global_batch_size=16"]).launcher
    assert isinstance(launcher, LocalLauncherConfig)
    assert (launcher.nodes, launcher.nproc_per_node, launcher.head) == (2, 8, "node-1:30007")


def test_the_sbatch_script_leaves_the_device_of_nodes_without_gpus(tmp_path: Path) -> None:
    arguments, _ = batch(tmp_path, SLURM_GPUS_ON_NODE="0", RANKS="2")
    assert "launcher.nproc_per_node=2" in arguments
    assert "train.device=cuda" not in arguments


def test_the_sbatch_script_runs_in_apptainer_or_pyxis(tmp_path: Path) -> None:
    mounts = f"{tmp_path}:{tmp_path},/data:/data"
    arguments, _ = batch(tmp_path, IMAGE="sophia.sif", MOUNTS="/data")
    start = arguments.index("apptainer")
    assert arguments[start : arguments.index("train.py")] == shlex.split(
        f"apptainer exec --nv --bind {mounts} --pwd {tmp_path} sophia.sif python"
    )
    arguments, _ = batch(tmp_path, IMAGE="registry/sophia:1", MOUNTS="/data")
    assert {f"--container-mounts={mounts}", "--container-image=registry/sophia:1"} <= set(arguments)


def examples(file: str, program: str) -> list[list[str]]:
    """The words of a file's example commands of a program, which its comment has without what follows two spaces."""
    text = re.sub(r" \\\n# +", " ", (CLUSTER / file).read_text())
    lines = re.findall(r"^#     (\S.*?)(?: {2,}.*)?$", text, re.MULTILINE)
    split = [[*itertools.dropwhile(re.compile(r"[A-Z]+=").match, shlex.split(line))] for line in lines]
    return [words for words in split if words[0] == program]


def compose_on_nodes(words: list[str], flag: str, nodes: str, overrides: list[str]) -> None:
    """Compose with eight ranks on each of the nodes that the flag asks for; the ranks have to divide the batch."""
    asked = re.search(rf"{flag}[= ](\d+)", " ".join(words))
    ranks = [f"launcher.nodes={asked[1] if asked else nodes}", "launcher.nproc_per_node=8", "launcher.head=node-1"]
    assert compose([*overrides, *ranks]).train.global_batch_size == 480


def test_each_example_of_the_sbatch_script_divides_its_batch_over_the_ranks_of_its_nodes() -> None:
    text = (CLUSTER / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH (--[a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert asked["--gpus-per-node"] == "8"
    commands = examples("slurm.sbatch", "sbatch")
    assert len(commands) > 2
    for words in commands:
        overrides = words[words.index("scripts/cluster/slurm.sbatch") + 1 :]
        compose_on_nodes(words, "--nodes", asked["--nodes"], overrides)


def test_each_example_of_skypilot_divides_its_batch_over_the_ranks_of_its_nodes() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task["resources"]["accelerators"].endswith(":8")
    commands = examples("skypilot.yaml", "sky")
    assert len(commands) > 3
    for words in commands:
        variables = dict(after.split("=", 1) for word, after in itertools.pairwise(words) if word == "--env")
        overrides = variables.get("OVERRIDES", task["envs"]["OVERRIDES"]).split()
        compose_on_nodes(words, "--num-nodes", str(task["num_nodes"]), overrides)
        asked = {after for word, after in itertools.pairwise(words) if word == "--secret"}
        assert asked <= {*task["secrets"]}
        assert "tracker=wandb" not in overrides or "WANDB_API_KEY" in asked


def jobset() -> tuple[dict[str, Any], dict[str, Any]]:
    """The specifications of the set's job and of its pods."""
    _, found = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job, job["template"]["spec"]


def test_kubernetes_restarts_a_saved_run_and_fails_a_refused_or_diverged_one() -> None:
    job, pod = jobset()
    by_code = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", ())
    }
    assert by_code == {EXIT_CONFIGURATION: "FailJob", EXIT_DIVERGED: "FailJob", EXIT_PREEMPTED: "Ignore"}
    assert pod["terminationGracePeriodSeconds"] > SAVING_SECONDS
    # A dead rank ends those of all pods, with codes of their own: the set restarts, not a pod.
    assert job["backoffLimit"] == 0


def test_the_command_of_kubernetes_is_valid() -> None:
    job, pod = jobset()
    python, script, *overrides = pod["containers"][0]["args"]
    assert (python, script) == ("python", "train.py")
    config = compose(overrides)
    assert isinstance(config.launcher, LocalLauncherConfig)
    assert config.launcher.nodes == job["parallelism"] == job["completions"]
    mount = pod["containers"][0]["volumeMounts"][0]["mountPath"]
    assert config.output_dir.startswith(mount)


def test_skypilot_recovers_a_saved_run_and_its_command_is_valid() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_PREEMPTED]
    shell = f"set -f; python() {{ printf '%s\\n' \"$@\"; }}; {task['run'].replace('exec .venv/bin/python', 'python')}"
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    said = subprocess.run(["bash", "-c", shell], env={**os.environ, **nodes, **task["envs"]}, capture_output=True)
    config = compose(said.stdout.decode().splitlines()[1:])
    assert isinstance(config.launcher, LocalLauncherConfig)
    assert (config.launcher.nodes, config.launcher.head) == (2, "10.0.0.1")


def test_the_image_has_every_package_and_the_same_environment_as_apptainers() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {*packages, "configs", "train.py", "requirements.lock", "results/reference.json"} <= kept
    files = [(ROOT / "Dockerfile").read_text(), (CLUSTER / "sophia.def").read_text()]
    installed = [set(re.findall(r"no-install-recommends ([^\\\n]*)", text)[0].split()) for text in files]
    assert installed[0] - installed[1] == {"tini"}
    assert all(
        "requirements.lock" in text and "FROM debian:bookworm-slim" in text.replace("From:", "FROM") for text in files
    )


@pytest.mark.parametrize("launcher", group_options("launcher"))
def test_a_study_that_is_given_a_launcher_of_runs_names_one_that_hydra_has(launcher: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        study.split(["study=smoke", f"launcher={launcher}"])
    named = str(caught.value).rpartition("give ")[2]
    assert named.startswith("hydra/launcher=")
    assert compose_dictionary([named])["launcher"]["name"] == "local", "Hydra's own settings of the launcher alone"


def test_nodes_need_a_head_and_no_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"launcher\.head: missing with launcher\.nodes=2"):
        compose(["launcher.nodes=2"])
    assert main(["-m", "launcher.nodes=2", "launcher.head=node-1", "seed=0,1"]) == EXIT_CONFIGURATION
    assert "launcher.head does not work with -m" in capsys.readouterr().err
