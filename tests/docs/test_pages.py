"""What the pages and the workflows name is there: files that are linked or named, and targets of make."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("results/*/README.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def links(page: Path) -> list[str]:
    """Targets of a page's Markdown links and pictures, less those of other sites."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_of_a_page_leads_to_a_file_and_to_a_heading_of_it(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_links_every_page() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert {page for page in PAGES if page.parent in (ROOT, ROOT / "docs")} - linked == {ROOT / "README.md"}


def test_every_file_that_contributing_names_is_there() -> None:
    named = re.findall(r"(?<![\w/<>*.-])[\w.-]+(?:/[\w.-]+)+\.\w+(?![\w>])", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *WORKFLOWS], ids=lambda path: path.name)
def test_every_target_of_make_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"(?:^|`|run: |&& )make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert named <= TARGETS


def test_the_workflows_check_what_ci_checks() -> None:
    targets = [set(re.findall(r"make ([a-z-]+)", path.read_text())) for path in (ROOT / ".ci" / "run", *WORKFLOWS)]
    assert targets[0] - {"setup"} <= set.union(*targets[1:])
