"""Keys stay in the environment: no configuration takes one, and no message shows one."""

from __future__ import annotations

import pytest

from training import command
from training.compose import compose
from training.config import ConfigurationError
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


def test_what_is_given_to_a_key_is_hidden_though_no_variable_holds_it() -> None:
    with pytest.raises(ConfigurationError, match=r"tracker\.api_key=<hidden>: unknown key; did you mean"):
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
    with pytest.raises(
        ConfigurationError, match=r"holds WANDB_API_KEY in the clear.*; set it in the environment"
    ) as caught:
        compose(["launcher=slurm", override])
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["eval.tokens=1000: not a known value", "write key=value", "export WANDB_API_KEY=$KEY", "tokenizer=gpt2", ""],
)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert redacted(text) == text
    assert secret_in(text) is None
