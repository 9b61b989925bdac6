"""What mkdocs cannot do by itself: the generated reference, and what the pages link outside docs/.

The pages link files of the repository as GitHub needs it. On the site, a linked Markdown file is a page, with what it links
in turn; other text is a page that shows it; a folder is a list of its files; any other file is copied.

`<!-- include: <file> <part> -->` stands for the part of a file between `<!-- <part>:begin -->` and `<!-- <part>:end -->`,
and `<!-- include: <file> <part> first paragraph -->` for its first paragraph.
"""

import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from docs.mkdocs import reference  # noqa: E402

DOCS = ROOT / "docs"
HOME = "index.md"
#: Text that a page shows, and how it is highlighted.
LANGUAGES = {
    ".json": "json",
    ".jsonl": "json",
    ".py": "python",
    ".sbatch": "bash",
    ".sh": "bash",
    ".toml": "toml",
    ".yaml": "yaml",
    ".yml": "yaml",
}
MOST_SHOWN = 200_000  # bytes; longer text is copied
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|/)([^()\s#]+)(#[^()\s]*)?(?=\))")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r"<!-- include: (\S+) (\w+)( first paragraph)? -->")
LIST_AFTER_TEXT = re.compile(r"^((?![-*|#]|\d+\. |\s).+\n)(?=[-*] |1\. )", re.MULTILINE)
CODE_WITH_PIPES = re.compile(r"`[^`\n]*\\\|[^`\n]*`")

_uris: dict[Path, str] = {}  # where the site has a file or folder from outside docs/


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and, transitively, what pages link."""
    _uris.clear()
    for uri, content in reference.pages(ROOT).items():
        files.append(File.generated(config, uri, content=content))
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while pages:
        page = pages.pop()
        for target in linked(page):
            if target in _uris or target.is_relative_to(DOCS) or target == ROOT / "README.md":
                continue
            listed = target.is_dir() and not (target / "README.md").is_file()
            if target.is_dir() and not listed:
                target = target / "README.md"
            name = target.relative_to(ROOT).as_posix()
            added: dict[str, Any] = {"abs_src_path": str(target)}
            if listed:
                name, added = f"{name}.md", {"content": listing(target)}
                pages += [target]
            elif target.suffix == ".md":
                pages += [target]
            elif target.suffix in LANGUAGES and target.stat().st_size <= MOST_SHOWN:
                added = {"content": shown(target, name)}
                name = f"{name}.md"
            _uris[target] = name
            files.append(File.generated(config, name, inclusion=InclusionLevel.NOT_IN_NAV, **added))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Include parts of files, and lead links of the repository to the site's pages."""
    source = page.file.abs_src_path
    if source is None:
        return markdown
    place = Path(source).parent
    text = INCLUDE.sub(
        lambda found: moved(part(place / found[1], *found.groups()[1:]), place / found[1], place), markdown
    )

    def changed(prose: str) -> str:
        # GitHub needs pipes in a table's code escaped, where Python-Markdown shows the backslash, and Python-Markdown an empty
        # line between a paragraph and its list.
        prose = CODE_WITH_PIPES.sub(lambda found: found[0].replace("\\|", "|"), prose)
        prose = LIST_AFTER_TEXT.sub(r"\1\n", prose)
        return LINK.sub(lambda found: site_link(found, place, page.file.src_uri), prose)

    return outside_code(text, changed)


def linked(page: Path) -> list[Path]:
    """Return the files and folders that a page links, or that a folder holds."""
    if page.is_dir():
        return [one for one in sorted(page.iterdir()) if one.is_file() and not one.name.startswith(".")]
    text = page.read_text(encoding="utf-8")
    for name, named, first in INCLUDE.findall(text):
        text += moved(part(page.parent / name, named, first), page.parent / name, page.parent)
    targets = [(page.parent / target).resolve() for target, _ in LINK.findall(FENCE.sub("", text))]
    return [target for target in targets if target.exists() and target.is_relative_to(ROOT)]


def site_link(link: re.Match[str], place: Path, uri: str) -> str:
    """Return the link as the site's page needs it; unchanged, and reported by mkdocs, if it leads nowhere."""
    target = (place / link[1]).resolve()
    if target == ROOT / "README.md":
        return posixpath.relpath(HOME, posixpath.dirname(uri))
    if target.is_dir() and (target / "README.md").is_file():
        target = target / "README.md"
    known = _uris.get(target)
    if target.is_relative_to(DOCS):
        known = target.relative_to(DOCS).as_posix()
    if known is None:
        return link[0]
    return posixpath.relpath(known, posixpath.dirname(uri)) + (link[2] or "" if known.endswith(".md") else "")


def part(file: Path, name: str, first: str | None) -> str:
    """Return a marked part of a file, or its first paragraph. PluginError if the file has no such part."""
    found = re.search(
        rf"<!-- {name}:begin -->\s*(.*?)\s*<!-- {name}:end -->", file.read_text(encoding="utf-8"), re.DOTALL
    )
    if found is None:
        raise PluginError(f"{file} has no part between <!-- {name}:begin --> and <!-- {name}:end -->")
    return found[1].partition("\n\n")[0] if first else found[1]


def moved(text: str, file: Path, place: Path) -> str:
    """Rewrite the links of a file's text for a page in `place`."""
    there = posixpath.relpath(file.resolve().parent.as_posix(), place.resolve().as_posix())
    return LINK.sub(lambda found: posixpath.normpath(posixpath.join(there, found[1])) + (found[2] or ""), text)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to all but fenced code."""
    return "".join(piece if number % 2 else change(piece) for number, piece in enumerate(FENCE.split(text)))


def shown(file: Path, name: str) -> str:
    """Return a page that shows a text file."""
    text = file.read_text(encoding="utf-8").rstrip()
    fence = "`" * 4
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n{fence}{LANGUAGES[file.suffix]}\n{text}\n{fence}\n"


def listing(folder: Path) -> str:
    """Return a page that links the files of a folder."""
    name = folder.relative_to(ROOT).as_posix()
    lines = [
        f"- [{one.name}]({folder.name}/{one.name}{'.md' if one.suffix in LANGUAGES else ''})" for one in linked(folder)
    ]
    return "\n".join([f"---\nsearch: {{exclude: true}}\n---\n# {name}", "", *lines, ""])
