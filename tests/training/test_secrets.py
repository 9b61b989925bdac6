"""Keys stay in the environment: no configuration takes one, and no message shows one."""

from __future__ import annotations

import importlib

import pytest

from training.compose import compose
from training.config import ConfigurationError
from training.launching import command
from training.secrets import redacted, secret_in

KEY = "5ec4e7" * 6 + "abcd"


@pytest.mark.parametrize(
    "override",
    [
        f"+tracker.api_key={KEY}",
        f"tracker.api_key={KEY}",
        f"+wandb_token={KEY}",
        f"++tracker.project.password={KEY}",
        f"tracker.project={KEY}[",
        f"optimizer.lr={KEY}",
        f"tracker={KEY}",
    ],
)
def test_no_refusal_shows_a_key(
    override: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert command.main([override]) == 2
    said = capfd.readouterr()
    assert said.err.count("error: ") == 1
    assert KEY not in said.err + said.out


@pytest.mark.parametrize(
    "line",
    [
        f"training.launching.command --cfg={KEY}",
        f"scripts.plan gpus={KEY}",
        f"scripts.plan cluster.gpus=[{KEY}",
        f"scripts.study run {KEY}",
        f"scripts.study run study={KEY}",
    ],
)
def test_no_command_shows_a_key(line: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    module, *words = line.split()
    assert importlib.import_module(module).main(words) == 2
    said = capfd.readouterr()
    assert "<WANDB_API_KEY>" in said.err
    assert KEY not in said.err + said.out


def test_what_is_given_to_a_key_is_hidden_though_no_variable_holds_it() -> None:
    with pytest.raises(ConfigurationError, match=r"tracker\.api_key=<hidden>: unknown key; known keys of tracker"):
        compose(["+tracker.api_key=abcdef"])


@pytest.mark.parametrize(
    "override",
    [
        "launcher.setup=['export WANDB_API_KEY=abcdef']",
        f"launcher.setup=['wandb login {KEY}']",
        f"tracker.tags=[{KEY}]",
    ],
)
def test_a_key_that_would_be_written_to_the_record_is_refused(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(ConfigurationError, match=r"holds WANDB_API_KEY, .*; set it in the environment") as caught:
        compose(["launcher=slurm", override])
    assert KEY not in str(caught.value)


def test_a_key_that_straddles_the_end_of_what_is_shown_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    for length in range(150, 201, 10):
        with pytest.raises(ConfigurationError) as caught:
            compose([f"optimizer.lr={'x' * length}{KEY}"])
        assert KEY[:8] not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:AWS_SECRET_ACCESS_KEY}",
        "a${oc.env:AWS_SECRET_ACCESS_KEY,none}",
        "${oc.decode:${oc.env:AWS_SECRET_ACCESS_KEY}}",
        "${oc.env:${oc.select:nothing,AWS_SECRET_ACCESS_KEY}}",
        "${oc.env:SLURM_JWT}",
    ],
)
@pytest.mark.parametrize("key", ["tracker.group", "tracker.tags"])
def test_no_value_is_read_from_a_variable_that_may_be_a_secret(
    key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "SLURM_JWT"):
        monkeypatch.setenv(name, KEY)
    given = f"['{value}']" if key == "tracker.tags" else f"'{value}'"
    with pytest.raises(
        ConfigurationError, match=rf"{key}.*: reads the environment variable (AWS_SECRET|SLURM_JWT)"
    ) as caught:
        compose([f"{key}={given}"])
    assert KEY not in str(caught.value)


def test_a_harmless_variable_may_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SCRATCH", raising=False)
    assert compose(["name=job-${oc.env:SLURM_JOB_ID}"]).name == "job-17"
    assert compose(["output_dir='${oc.env:SCRATCH,runs}/mine'"]).output_dir == "runs/mine"
    with pytest.raises(ConfigurationError, match="name: the environment variable SCRATCH is not set"):
        compose(["name=${oc.env:SCRATCH}"])


@pytest.mark.parametrize(
    "text",
    ["eval.tokens=1000: not a known value", "write key=value", "export WANDB_API_KEY=$KEY", "tokenizer=gpt2", ""],
)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert redacted(text) == text
    assert secret_in(text) is None


def test_a_short_value_of_a_variable_that_is_named_like_a_secret_hides_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert redacted("give true or false") == "give true or false"
