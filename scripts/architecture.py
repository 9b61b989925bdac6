"""Draw the imports between the packages, and between the modules of training, into docs/architecture.md.

python scripts/architecture.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

import grimp

from analysis.pages import write_part

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
PACKAGES = (
    "sophia",
    "models",
    "data",
    "training",
    "planning",
    "downstream",
    "analysis",
    "studies",
    "scripts",
    "benchmarks",
)
#: Imported by nearly every module of training; their arrows would hide the others.
EVERYWHERE = {f"training.{name}" for name in ("config", "exits", "records", "secrets")}

Imports = Mapping[str, set[str]]


def drawings() -> dict[str, str]:
    """Return the drawings by the name of their part in the page."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    packages = imports_between(graph, lambda module: module.split(".")[0])
    return {"packages": drawing(packages), "training": drawing(without_shortcuts(imports_between(graph, _node)))}


def _node(module: str) -> str | None:
    """Return a module's node in the picture of training: itself, one node for all strategies, or None for folders."""
    if module.startswith("training.strategies"):
        return "training.strategies"
    folders = ("training", "training.launching", "training.recording", "training.reliability")
    return module if module.startswith("training.") and module not in {*folders, *EVERYWHERE} else None


def imports_between(graph: grimp.ImportGraph, node: Callable[[str], str | None]) -> Imports:
    """Return the imports between nodes; `node` maps a module to its node."""
    found: dict[str, set[str]] = {}
    for module in sorted(graph.modules):
        name = node(module)
        if name is not None:
            imported = {node(one) for one in graph.find_modules_directly_imported_by(module)}
            found.setdefault(name, set()).update(one for one in imported if one not in (None, name))
    return found


def without_shortcuts(imports: Imports) -> Imports:
    """Return the transitive reduction: no arrow that follows from others.

    Raises:
        graphlib.CycleError: the imports have a cycle.
    """
    reached: dict[str, set[str]] = {}
    kept: dict[str, set[str]] = {}
    for name in TopologicalSorter(imports).static_order():
        beyond = {far for near in imports[name] for far in reached[near]}
        kept[name] = imports[name] - beyond
        reached[name] = imports[name] | beyond
    return kept


def drawing(imports: Imports) -> str:
    """Return the graph in Mermaid syntax, with a box for each folder."""
    folders: dict[str, list[str]] = {}
    for name in sorted(imports):
        folder, _, leaf = name.removeprefix("training.").rpartition(".")
        folders.setdefault(folder, []).append(f'    {name}["{leaf}"]')
    lines = ["```mermaid", "flowchart TD"]
    for folder, nodes in sorted(folders.items()):
        lines += [f"    subgraph {folder}", *(f"    {node}" for node in nodes), "    end"] if folder else nodes
    lines += [f"    {name} --> {one}" for name in sorted(imports) for one in sorted(imports[name])]
    return "\n".join([*lines, "```"])


def main() -> int:
    for name, text in drawings().items():
        write_part(PAGE, name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
