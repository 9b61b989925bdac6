"""What the site is made of agrees with the code, without building it: `make docs` does that, in an environment of its own."""

import csv
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

import sophia
from analysis.trial_tables import CURVES_SCHEMA
from docs.mkdocs import reference
from training.config import RunConfig
from training.config_keys import keys
from training.mistakes import config_groups, group_options

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_the_reference_has_every_group_choice_and_key_once_for_each_meaning() -> None:
    page = reference.configuration(ROOT)
    for group in {*config_groups()} & {*RunConfig.model_fields, "experiment"}:
        for choice in group_options(group):
            assert f"\n| `{choice}` | " in page, f"{group}={choice}"
    for key in keys():
        rows = [line for line in page.splitlines() if line.startswith(f"| `{key.name}` | ")]
        told = [row for row in rows if reference.escaped(key.meaning) in row.replace("&#124;", "|")]
        assert key.name == key.tag or (told and len({*rows}) == len(rows)), key


def test_the_reference_gives_a_default_for_each_choice_that_differs() -> None:
    (row,) = (one for one in reference.configuration(ROOT).splitlines() if one.startswith("| `optimizer.gamma` |"))
    _, default, _, kind = row.strip("| ").split(" | ")
    assert (default, kind) == ("`0.05` with sophiag<br>`0.01` with sophiah", "number &gt; 0")


def test_the_reference_has_everything_that_the_library_exports() -> None:
    assert set(re.findall(r"^::: sophia\.(\w+)$", reference.library(ROOT), re.MULTILINE)) == set(sophia.__all__)


def test_the_reference_has_every_option_of_a_command() -> None:
    page = reference.commands(ROOT)
    text = (ROOT / "scripts" / "study.py").read_text()
    assert {*re.findall(r'"(--[a-z-]+)"', text)} <= {*re.findall(r"^\| `(--[a-z-]+)`", page, re.MULTILINE)}
    assert all((ROOT / path).is_file() for paths in reference.COMMANDS.values() for path in paths)


def test_the_page_of_records_names_every_column() -> None:
    page = (DOCS / "records.md").read_text()
    with (ROOT / "results" / "challenge" / "trials.csv").open() as file:
        columns = {name for name in next(csv.reader(file)) if "." not in name} - set(RunConfig.model_fields)
    assert [name for name in {*columns, *CURVES_SCHEMA.names} if f"`{name}`" not in page] == []


def test_the_site_is_built_strictly() -> None:
    assert "\nstrict: true\n" in (ROOT / "mkdocs.yml").read_text()
    assert re.findall(r"bin/mkdocs (.*)", (ROOT / "Makefile").read_text()) == ["build"]  # --quiet disables strictness


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_figure_of_the_home_page_shows_the_study_of_its_sentence() -> None:
    readme = (ROOT / "README.md").read_text().partition("<!-- results:begin -->")[2]
    study = re.search(r"\]\((results/\w+)/README\.md\)", readme)
    assert study is not None
    assert f"../{study[1]}/figures/" in (DOCS / "index.md").read_text()


def test_the_lock_of_the_site_has_each_of_its_packages_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = dict(line.split("==") for line in (ROOT / "requirements-docs.lock").read_text().splitlines())
    versions = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    for line in project["optional-dependencies"]["docs"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(versions[wanted.name]), line
