"""--help and --cfg job explain every key with its line in training/config.py."""

import re

import pytest
import yaml

from training.compose import compose_dictionary
from training.config import RunConfig
from training.config_keys import keys, sections_of
from training.launching import command
from training.launching.help import annotated, help_text
from training.mistakes import config_groups, group_options, known_keys


def leaves() -> set[str]:
    """Return every key that holds a value."""
    return {key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())}


def test_every_key_of_every_choice_has_a_meaning_of_one_line() -> None:
    told = list(keys())
    assert {key.name for key in told} == leaves()
    for key in told:
        assert re.fullmatch(r"\S.*[.]", key.meaning), key


@pytest.mark.parametrize("width", [80, 120])
def test_help_names_every_group_choice_and_key_and_fits_the_terminal(width: int) -> None:
    text = help_text(compose_dictionary([]), width)
    assert max(map(len, text.splitlines())) <= width
    for key in leaves() - {key.tag for key in keys()}:
        assert re.search(rf"^  {re.escape(key)}[= ]", text, re.MULTILINE), key
    for group in {*config_groups()} - {"cluster", "study"}:
        for choice in group_options(group):
            assert re.search(rf"(?<![\w/]){re.escape(choice)}(?![\w/])", text), choice


def test_help_shows_the_values_that_the_command_line_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["optimizer=lion", "train.steps=7", "data=text", "data.paths=[a.txt,b.txt]", "--help"]) == 0
    shown = capsys.readouterr().out
    for row in ("optimizer.betas=[0.95,0.98] ", "train.steps=7 ", "data.paths=[a.txt,b.txt] "):
        assert f"\n  {row}" in shown
    assert re.search(r"^  optimizer\.gamma  +γ.*With optimizer=sophiag,\s+sophiah\.", shown, re.MULTILINE | re.DOTALL)


NEEDED = {"text": ["data.paths=[a.txt]"], "external": ["optimizer.factory=torch.optim:NAdam"]}


@pytest.mark.parametrize("override", ["optimizer.gama=0.01", "train.steps=-1", "optimizer=external"])
def test_cfg_job_refuses_what_a_run_refuses(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([override]) == 2
    refused = capsys.readouterr().err
    assert command.main([override, "--cfg", "job"]) == 2
    assert (capsys.readouterr()) == ("", refused)


@pytest.mark.parametrize("group", sorted({"optimizer", "strategy", "launcher", "data"}))
def test_cfg_job_explains_each_key_and_stays_the_yaml_that_hydra_prints(
    group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for choice in group_options(group):
        overrides = [f"{group}={choice}", *NEEDED.get(choice, [])]
        assert command.main([*overrides, "--cfg", "job", "--resolve"]) == 0
        text = capsys.readouterr().out
        values = yaml.safe_load(text)
        ours = {name for name, field in RunConfig.model_fields.items() if sections_of(field.annotation)}
        assert ours <= values.keys()
        assert values["train"] == compose_dictionary(overrides)["train"]
        for line in text.splitlines():
            assert line.startswith((" ", "- ")) or line.endswith(":") or "  # " in line, line


def test_a_comment_is_never_written_into_a_value_of_several_lines() -> None:
    text = yaml.safe_dump({"name": "a\nb # c\n", "seed": 1, "output_dir": "x " * 60})
    assert yaml.safe_load(annotated(text)) == yaml.safe_load(text)
    assert "seed: 1  # Sets seeds.model" in annotated(text)
