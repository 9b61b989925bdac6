"""The commands of the pages: each composes, its arguments parse, or the page says why it is not checked.

tests/readme runs README's commands. Those of the tutorial that train, compare and report run here, with a tiny corpus.
"""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import prepare_corpus
from training.compose import compose
from training.launching import command
from training.launching.sweep import check_trials, trials

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
BLOCK = re.compile(r"(?:<!-- not checked: ([\w, ]+): [^\n]+ -->\n)?^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class ParsedError(Exception):
    """Raised with the arguments that a script's parser has accepted, so that the script does not go on."""


def blocks(page: Path) -> list[tuple[set[str], list[str]]]:
    """The page's shell blocks: what it says is not checked, and the commands without comments."""
    found = []
    for excused, block in BLOCK.findall(page.read_text()):
        lines = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in block.replace("\\\n", "").splitlines()]
        found.append((set(excused.split(", ")) - {""}, [one for line in lines for one in line.split(" && ") if one]))
    return found


def test_every_shell_block_is_found() -> None:
    for page in PAGES:
        assert len(blocks(page)) == page.read_text().count("```bash"), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_accepted_or_the_page_says_why_it_is_not_checked(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the factories and search files of examples/
    for excused, lines in blocks(page):
        split = [shlex.split(line) for line in lines]
        commands = [[word for word in words if word != "…" and not re.match(r"[A-Z_]+=", word)] for words in split]
        assert excused <= {words[0] for words in commands}, "the page excuses a command that the block does not have"
        for words in commands:
            if words[0] == "make":
                assert set(words[1:]) <= TARGETS, words
            elif words[0] not in excused and words != [".", ".venv/bin/activate"]:
                check(words)


def check(words: list[str]) -> None:
    """Raise, or exit, if a command of the project does not accept its arguments."""
    if "train.py" in words:
        at = words.index("train.py")
        assert words[:at] == ["python"] or words[0] == "torchrun", words
        flags, primary = command.parse(words[at + 1 :])
        swept = trials(flags.overrides, primary) if flags.multirun else [flags.overrides]
        check_trials([swept[0], *swept[1:][-1:]], primary)  # the last one has the last value of each key
        return
    assert words[0] == "python", f"{words[0]}: check it, or write <!-- not checked: {words[0]}: why --> above its block"
    name = words[1].removesuffix(".py").replace("/", ".")
    script = importlib.import_module(name)
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> None:
        raise ParsedError(parse(parser, arguments))

    with pytest.MonkeyPatch.context() as patched:
        for method in ("parse_args", "parse_intermixed_args"):
            patched.setattr(argparse.ArgumentParser, method, parsed)
        patched.setattr(sys, "argv", words[1:])
        with pytest.raises(ParsedError) as stopped:
            script.main()
    check_options(name, script, stopped.value.args[0])


def check_options(name: str, script: Any, options: argparse.Namespace) -> None:
    """Check what a script's parser accepts as any text."""
    if name in ("scripts.prepare_data", "scripts.check_optimizer"):
        compose(options.overrides)
    elif name == "scripts.plan":
        cluster, overrides = script.split_cluster(options.overrides)
        script.compose_for(overrides, cluster)
    elif name == "scripts.plot":
        assert options.name in (script.TABLES if options.table else script.FIGURES)
    elif name == "scripts.study":
        own = [one for one in options.overrides if one.startswith("challenger.")]
        spec = script.load_spec(script.split([one for one in options.overrides if one not in own])[0])
        if own:
            from studies.challenge import challenger_of, with_challenger

            with_challenger(spec, challenger_of(own))


@pytest.mark.slow
def test_the_tutorial_trains_compares_reports_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in order, with fewer and shorter runs; `make setup` and `make demo` are README's."""
    tiny = [*prepare_corpus(tmp_path), "train.steps=2", "schedule.warmup_steps=1", "train.global_batch_size=2"]
    tiny += ["train.sequence_length=16", "eval.interval=1", "eval.tokens=64", "train.device=cpu"]
    lines = [line for _, block in blocks(ROOT / "docs" / "tutorial.md") for line in block if line.startswith("python ")]
    monkeypatch.chdir(tmp_path)
    assert command.main([*tiny, "experiment=demo/sophiag", "output_dir=runs/demo", "name=sophiag"]) == 0  # of make demo
    for line in lines:
        script, *arguments = shlex.split(line)[1:]
        if script == "train.py":
            arguments = [one.replace("seed=1,2,3", "seed=1,2") for one in arguments]
            assert command.main([*arguments, *tiny]) == 0, line
        else:
            paths = [str(path) for one in arguments if "*" in one for path in sorted(tmp_path.glob(one))]
            plain = [one for one in arguments if "*" not in one]
            main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
            assert main([*paths, *plain]) == 0, line
    assert (tmp_path / "runs" / "tutorial" / "comparison.png").is_file()
    assert (tmp_path / "report" / "report.html").is_file()
