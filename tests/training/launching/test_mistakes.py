"""Common command-line mistakes, each with its one-line message: the table is mistakes.txt."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.errors import DataError
from training.compose import compose
from training.config import ConfigurationError
from training.launching import ranks
from training.launching.inputs import refuse_absent_inputs
from training.mistakes import SYNONYMS, SYNONYMS_OF_CHOICES, config_groups, group_options, known_keys

ROOT = Path(__file__).resolve().parents[3]
TABLE = Path(__file__).with_name("mistakes.txt").read_text()
ROWS = re.findall(r"^\$ (.+)\n  (.+)$", TABLE, re.MULTILINE)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with only notes.txt, in which no run can start."""

    def begun(*_: object) -> None:
        raise AssertionError("the command was not refused")

    monkeypatch.setattr("training.run.execute", begun)
    monkeypatch.setattr(ranks, "start_ranks", begun)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a text\n")
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"], "a refused command leaves nothing"


def refused(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command line, split as a shell would. Returns its exit code."""
    script, *words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [script, *words])
    module = "training.launching.command" if script == "train.py" else script.removesuffix(".py").replace("/", ".")
    main = importlib.import_module(module).main
    return main(words) if main.__code__.co_argcount else main()


def test_the_table_is_whole() -> None:
    lines = [line for line in TABLE.splitlines() if line and not line.startswith("#")]
    assert len(lines) == 2 * len(ROWS)
    assert len({line for line, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("line", "message"), ROWS, ids=[line for line, _ in ROWS])
def test_a_mistake_is_one_line_with_the_remedy(
    line: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert refused(line, monkeypatch) == 2
    said = capfd.readouterr().err.replace(str(here), "<here>").replace(str(ROOT), "<repository>")
    assert re.sub(r"-[0-9a-f]{8}-s", "-<hash>-s", said) == f"error: {message}\n"


PROPOSED = re.compile(r"""(?:write|choose|such as|:) ("[\w.]+=[^"]+"|'[\w.]+=[^']+'|[\w.]+=\w[\w.-]*)""")
#: Remedies that lead to another error.
STILL_REFUSED = {
    ("optimizer.betas=[0.9]",),  # closed, and too short
    ("data=text",),  # the choice, which needs data.paths
    ("name=my run",),  # quoted, and no valid name
    ("data.paths=['/tmp/jörg']",),  # quoted, and a key of data=text alone
    ("launcher.nodes=2",),  # which needs launcher.head
}


def remedies(words: list[str], message: str) -> Iterator[list[str]]:
    """Return the overrides that a message proposes."""
    yield from (shlex.split(proposed) for proposed in PROPOSED.findall(message) if proposed != "key=value")
    head = message.partition(": ")[0]
    for meant in re.findall(r"did you mean (.+?)\?", message):
        key, _, choices = meant.partition(" of ")
        if "=" in key:
            yield [key]
        elif "unknown choice" in message:
            yield from ([f"{head.partition('=')[0]}={option}"] for option in key.split(" or "))
        else:
            value = next(word.partition("=")[2] for word in words if word.lstrip("+").startswith(head))
            yield [*filter(None, choices.split(" or ")[:1]), f"{key}={value}"]


def with_remedy(words: list[str], message: str, remedy: list[str]) -> tuple[str, ...]:
    """Return the command line with the refused override replaced by the remedy."""
    keys = {override.partition("=")[0] for override in remedy}
    others = [(word, word.partition("=")[0]) for word in words if re.match(r"[\w.]+=.", word)]
    kept = [word for word, key in others if key not in keys and not message.startswith((f"{key}: ", f"{word}: "))]
    return (*kept, *remedy)


def test_typing_the_proposed_remedy_is_accepted() -> None:
    runs = [(shlex.split(line)[1:], message) for line, message in ROWS if line.startswith("train.py ")]
    refusals = {}
    for typed in {with_remedy(*run, remedy) for run in runs for remedy in remedies(*run)}:
        try:
            compose(typed)
        except ConfigurationError as error:
            refusals[typed] = str(error)
    assert refusals.keys() == STILL_REFUSED, refusals


@pytest.mark.parametrize("given", ["resume=/nowhere", "model.init_from=/nowhere", "data=openwebtext"])
def test_an_existing_run_is_not_refused_for_missing_files(given: str, tmp_path: Path) -> None:
    """It may be finished. A run that needs the files reports them when it opens them."""
    config = compose([given, "train.precision=auto", f"output_dir={tmp_path}", f"data.directory={tmp_path}/tokens"])
    with pytest.raises((ConfigurationError, DataError)):
        refuse_absent_inputs(config)
    begun = compose([given, "train.precision=fp32", f"output_dir={tmp_path}", f"data.directory={tmp_path}/tokens"])
    (tmp_path / begun.run_name).mkdir()
    (tmp_path / begun.run_name / "config.yaml").write_text("")
    refuse_absent_inputs(config)


def test_synonyms_map_to_existing_keys_and_choices() -> None:
    assert {key.partition("[")[0].partition("=")[0] for key in SYNONYMS} <= known_keys()
    choices = {f"{group}={option}" for group in config_groups() for option in group_options(group)}
    assert SYNONYMS_OF_CHOICES.keys() | {key for key in SYNONYMS if "=" in key} <= choices


def test_a_synonym_has_one_meaning_and_is_not_a_key() -> None:
    names = [name for others in SYNONYMS.values() for name in others.split()]
    assert len(set(names)) == len(names)
    assert not set(names) & known_keys()
