"""A mistake in a YAML file is one line with the file, the line and the column, whatever it is."""

from pathlib import Path

import pytest

from training.compose import Primary, compose_dictionary
from training.config import ConfigurationError
from training.config_files import MAX_BYTES, read_yaml
from training.launching.command import main

# The file, where the mistake is (line and column), and what the line says of it.
MISTAKES = {
    "bracket": (b"train: {steps: 5\nseed: 1\n", (2, 5), "close the bracket"),
    "indentation": (b"train:\n  steps: 5\n seed: 3\n", (3, 2), "indent the line like its neighbours"),
    "tab": (b"train:\n\tsteps: 5\n", (2, 1), "indent with spaces"),
    "quote": (b"seed: 1\nname: 'abc\n", (3, 1), "close the quote"),
    "no colon": (b"seed: 1\ntrain\n  steps: 5\n", (3, 8), "space after the colon"),
    "two colons": (b"name: a: b\n", (1, 8), "in quotes"),
    "character": (b"name: @x\n", (1, 7), "put the value in quotes"),
    "duplicate key": (b"train:\n  steps: 5\n  steps: 6\n", (3, 3), "duplicate key steps"),
    "unknown tag": (b"seed: !foo 3\n", (1, 7), "the tag '!foo' is not allowed"),
    "Python tag": (b"seed: !!python/object/apply:os.system ['x']\n", (1, 7), "is not allowed"),
    "time": (b"seed: !!timestamp x\n", (1, 7), "is not allowed"),
    "path": (b"name: !!python/object/apply:pathlib.Path [a]\n", (1, 7), "is not allowed"),
    "NUL": (b"seed: 1\nname: a\0b\n", (2, 8), "character '\\x00'"),
    "Latin-1": (b"seed: 1\nname: j\xf6rg\n", (2, 8), "save the file as UTF-8"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), (1, 1), "save the file as UTF-8"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", (2, 1), "one document"),
    "no such alias": (b"seed: *nope\n", (1, 7), "undefined alias 'nope'"),
    "alias of itself": (b"seed: &a [*a]\n", (1, 7), "refers to itself"),
    "list as key": (b"? [a]\n: 1\n", (1, 3), "is not text"),
    "null as key": (b"seed: 1\nnull: 1\n", (2, 1), "the key 'null' is not text"),
    "switch as key": (b"train:\n  on: 5\n", (2, 3), "the key 'on' is not text"),
    "number as key": (b"3: 1\n", (1, 1), "the key '3' is not text"),
    "empty key": (b"train: {'': 1}\n", (1, 9), "give it a name"),
}
LEVELS = b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 10)) for c in range(98, 110))
MERGES = LEVELS.replace(b"[", b"{<<: [").replace(b"]", b"]}")
BOMBS = {"lists": b"a: &a [1]\n" + LEVELS, "merges": b"a: &a {x: 1}\n" + MERGES}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(mistake: str, tmp_path: Path) -> None:
    content, (line, column), said = MISTAKES[mistake]
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        compose_dictionary([], Primary("mine", tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/mine.yaml, line {line}, column {column}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bomb", BOMBS)
def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(bomb: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(BOMBS[bomb])
    with pytest.raises(ConfigurationError, match="more than 100,000 values after"):
        compose_dictionary([], Primary("mine", tmp_path))


OTHERS = {
    "text": (b"seed:1\n", "holds the text 'seed:1' instead of keys and values"),
    "list": (b"- a\n", "holds a list instead of keys and values"),
    "deep": (b"a: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
    "int": (b"seed: !!int x\n", "put text in quotes"),
    "digits": (b"seed: " + b"9" * 5000, "4300 digits"),
    "interpolation": (b"name: ${\n", "name: its ${...} cannot be read"),
    "large": (b"#" * (MAX_BYTES + 1), "larger than 1 MiB"),
    "defaults": (b"defaults: {model: gpt2_nano}\n", "defaults: not a list with one choice per line"),
    "two choices": (b"defaults:\n  - a: 1\n    b: 2\n", "defaults: not a list with one choice per line"),
}


@pytest.mark.parametrize("mistake", OTHERS)
def test_what_has_no_one_place_names_the_file(mistake: str, tmp_path: Path) -> None:
    content, said = OTHERS[mistake]
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        compose_dictionary([], Primary("mine", tmp_path))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_mistake_in_a_choice_of_a_group_is_one_line_of_a_run_of_a_sweep_and_of_help(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain:\n\tsteps: 5\n")
    for mode in ([], ["-m"], ["--help"], ["--cfg", "job"]):
        assert main([*mode, "--config-dir", str(tmp_path), "experiment=mine"]) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"error: {tmp_path}/experiment/mine.yaml, line 3, column 1: ")
        assert said.count("\n") == 1


@pytest.mark.usefixtures("permissions_bind")
def test_a_file_without_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch(mode=0)
    with pytest.raises(ConfigurationError, match=r"mine\.yaml: cannot be read \(Permission denied\)"):
        read_yaml(tmp_path / "mine.yaml")


def test_numbers_are_those_of_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("\ufeffa: 1e-3\nb: [1, x, null]\nc: &c {d: true}\ne: *c\n")
    assert read_yaml(tmp_path / "mine.yaml") == {"a": 0.001, "b": [1, "x", None], "c": {"d": True}, "e": {"d": True}}
