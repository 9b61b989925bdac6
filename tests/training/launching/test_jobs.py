"""Hydra's launchers run a list of jobs, each with its own overrides, and return exit codes."""

from pathlib import Path

import pytest
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from training.config import ConfigurationError
from training.config_files import CONFIG_DIRECTORY
from training.launching import jobs
from training.launching.command import main
from training.launching.jobs import launch, side_by_side

NANO = [
    *("model=gpt2_nano", "train.steps=2", "train.global_batch_size=2"),
    *("train.sequence_length=16", "train.precision=fp32", "train.compile=false", "eval.tokens=64", "eval.interval=2"),
]


@pytest.mark.slow
def test_jobs_run_sequentially_each_with_its_own_overrides(corpus: list[str], tmp_path: Path) -> None:
    common = [*corpus, *NANO, f"output_dir={tmp_path}"]
    codes = launch([[*common, "name=a", "optimizer=adamw"], [*common, "name=b", "optimizer=lion", "train.steps=1"]])
    assert codes == [0, 0]
    assert (tmp_path / "a" / "summary.json").is_file()
    lines = (tmp_path / "b.log").read_text().splitlines()
    assert lines[0] == f"run directory {tmp_path / 'b'}"
    assert lines[1].startswith("gpt2_nano, 0.1M parameters, on ")
    assert lines[1].endswith(": 1 steps of 32 tokens with lion; cpu, fp32")
    assert lines[-3].startswith("completed at step 1, validation loss ")
    assert lines[-2:] == [
        f"picture: python scripts/plot.py curves {tmp_path / 'b'}",
        f"text: python scripts/sample.py {tmp_path / 'b'}",
    ]


def test_a_job_that_is_refused_or_fails_does_not_end_the_others(tmp_path: Path) -> None:
    broken = tmp_path / "file"
    broken.write_text("not a directory")
    codes = launch(
        [
            ["name=refused", f"output_dir={tmp_path}", "train.steps=5", "schedule.warmup_steps=9"],
            [*NANO, "tokenizer=bpe", "name=broken", f"output_dir={tmp_path}", f"data.directory={broken}"],
        ]
    )
    assert codes == [2, 2]
    assert "warmup_steps=9" in (tmp_path / "refused.log").read_text()
    assert str(broken) in (tmp_path / "broken.log").read_text()


@pytest.mark.slow
def test_joblib_runs_jobs_in_parallel(tmp_path: Path) -> None:
    """The configurations are refused: the test covers the launcher, not training."""
    jobs = [[f"name=j{i}", f"output_dir={tmp_path}", "train.steps=5", f"schedule.warmup_steps={9 + i}"] for i in (0, 1)]
    assert launch(jobs, ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]) == [2, 2]
    assert "warmup_steps=10" in (tmp_path / "j1.log").read_text()


def test_an_unknown_launcher_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="hydra/launcher=nowhere"):
        launch([["name=a"]], ["hydra/launcher=nowhere"])


@pytest.mark.parametrize(
    "override", ["+hydra.job.env_set.A=b", "+experiment@hydra.job.env_set=x", "hydra/launcher=joblib"]
)
def test_a_job_cannot_set_hydras_keys(override: str) -> None:
    with pytest.raises(ConfigurationError, match="a key of hydra; give it on the command line"):
        launch([["name=a", override]])


@pytest.mark.parametrize("scontrol", [None, "#!/bin/sh\necho 'no controller' >&2; exit 1\n"])
def test_slurm_that_does_not_answer_is_a_configuration_error(
    scontrol: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if scontrol is not None:
        (tmp_path / "scontrol").write_text(scontrol)
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="launcher=slurm: no SLURM answers here"):
        launch([["name=a"]], ["hydra/launcher=submitit_slurm"])
    assert main(["launcher=slurm", f"output_dir={tmp_path}/runs"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: launcher=slurm: no SLURM answers here")
    assert said.count("\n") == 1


def test_the_number_of_parallel_jobs_follows_from_the_launcher() -> None:
    assert side_by_side([]) == 1
    assert side_by_side(["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]) == 3
    assert side_by_side(["hydra/launcher=submitit_slurm"]) is None


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["launcher=slurm"], "additional_parameters", {"requeue": True}),
        (["launcher=slurm", "launcher.requeue=false"], "additional_parameters", {"no_requeue": True}),
        (["launcher=submitit", "launcher.nproc_per_node=2"], "gpus_per_node", 2),  # else submitit hides them all
    ],
)
def test_submitits_jobs_may_be_requeued_and_see_their_gpus(overrides: list[str], key: str, value: object) -> None:
    import hydra

    with hydra.initialize_config_dir(str(CONFIG_DIRECTORY), version_base=None):
        launcher = hydra.compose("config", overrides, return_hydra_config=True).hydra.launcher
    assert OmegaConf.to_container(launcher, resolve=True)[key] == value


def test_a_job_of_submitit_without_a_result_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    """As after a node failure: Hydra's launcher would raise and leave the other jobs running."""
    import submitit

    class Lost(submitit.Job[JobReturn]):
        job_id, _sub_jobs, _cancel_at_deletion = "7", None, False

        def __init__(self) -> None:
            pass

        def wait(self) -> None:
            pass

        def _get_outcome_and_result(self) -> None:
            raise submitit.core.utils.UncompletedJobError("Job 7 (task: 0) has not produced any output\nits log is …")

    original = submitit.Job.results
    with jobs._lost_jobs_fail(["hydra/launcher=submitit_slurm"]):
        (returned,) = Lost().results()
    assert returned.return_value == 1
    assert "job 7 ended without a result: Job 7 (task: 0) has not produced any output" in caplog.text
    assert submitit.Job.results is original
