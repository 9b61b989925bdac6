"""The generated pages of the site: the library, every configuration key, the commands.

They are read from the code that they describe: sophia/__init__.py, training/config.py with configs/, the scripts' parsers,
the Makefile. Needs pydantic and PyYAML alone, so that the site builds without torch.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic_core import PydanticUndefined

from training.config import MAX_INT, RunConfig
from training.config_keys import Key, keys, sections_of

COMMANDS = {
    "Train": ("train.py", "scripts/prepare_data.py", "scripts/plan.py"),
    "Compare": ("scripts/compare.py", "scripts/study.py", "scripts/report.py", "scripts/plot.py"),
    "Optimizers": ("scripts/check_optimizer.py",),
    "Use a trained model": ("scripts/sample.py", "scripts/export.py", "scripts/evaluate.py", "scripts/publish.py"),
    "Several machines": (
        "scripts/cluster/slurm.sbatch",
        "scripts/cluster/skypilot.yaml",
        "scripts/cluster/kubernetes.yaml",
    ),
}
MOST_DEFAULTS = 4  # different values of one key that its row lists; more are the choices' own


def pages(root: Path) -> dict[str, str]:
    """Return the generated pages by their place in the site."""
    return {
        "reference/library.md": library(root),
        "reference/configuration.md": configuration(root),
        "reference/commands.md": commands(root),
    }


def library(root: Path) -> str:
    """Return the page of everything that `sophia` exports, module by module."""
    lines = [
        "# The library",
        "",
        "Everything that `import sophia` offers. [Sophia](../sophia.md) explains the method.",
        "",
    ]
    body = ast.parse((root / "sophia" / "__init__.py").read_text(encoding="utf-8")).body
    exported = {str(node.module): node.names for node in body if isinstance(node, ast.ImportFrom)}
    for module, names in sorted(exported.items(), key=lambda item: item[0] != "sophia.sophia"):
        text = (root / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        lines += [f"## `{module}`", "", paragraph(ast.get_docstring(ast.parse(text)) or ""), ""]
        lines += [f"::: sophia.{name.name}\n" for name in names]
    return "\n".join(lines)


def configuration(root: Path) -> str:
    """Return the page of every group with its choices, and every key with type, default and meaning."""
    lines = [
        "# Configuration",
        "",
        "Every group, `group=choice`, and every key, `key=value`: `python train.py optimizer=lion train.steps=1000`.",
        "Defaults are those of `configs/`. `python train.py … --help` shows the keys of one run with their values.",
        "",
    ]
    files = {
        path.relative_to(root / "configs"): path.read_text(encoding="utf-8") for path in root.glob("configs/**/*.yaml")
    }
    base = yaml.safe_load(files[Path("config.yaml")])
    told = list(keys())
    for section in dict.fromkeys(key.name.partition(".")[0] if "." in key.name else "" for key in told):
        choices = choices_of(section, files) if section else []
        lines += [f"## `{section}`" if section else "## The run", ""]
        if section and (text := sections_of(RunConfig.model_fields[section].annotation)[0].__doc__) and not choices:
            lines += [escaped(" ".join(text.split())), ""]
        if choices:
            default = next((one[section] for one in base["defaults"] if section in one), "")
            lines += [f"Default: `{section}={default}`.", ""]
            lines += table((f"`{section}=`", ""), ((f"`{one.name}`", escaped(one.comment)) for one in choices))
        own = [key for key in told if (key.name.partition(".")[0] if "." in key.name else "") == section]
        lines += table(("key", "default", "meaning", "type"), rows_of(own, choices, base))
    recipes = choices_of("experiment", files)
    lines += ["## `experiment`", "", "Recipes: several groups and keys at once.", ""]
    lines += table(("`experiment=`", ""), ((f"`{one.name}`", escaped(one.comment)) for one in recipes))
    return "\n".join(lines)


class Choice(NamedTuple):
    """A file of a group."""

    name: str
    comment: str  # at the top of the file
    values: Mapping[str, Any]  # of the group's keys


def choices_of(group: str, files: Mapping[Path, str]) -> list[Choice]:
    """Return the choices of a group, by name."""
    found = []
    for path, text in sorted(files.items()):
        if path.parts[0] == group:
            values: dict[str, Any] = yaml.safe_load(text) or {}
            top = re.match(r"((?:#.*\n)*)", text)
            said = [line.removeprefix("#").strip() for line in (top[0] if top else "").splitlines()]
            comment = " ".join(line for line in said if not line.startswith("@package"))
            found.append(Choice(path.relative_to(group).with_suffix("").as_posix(), comment, values.get(group, values)))
    return found


def rows_of(own: Iterable[Key], choices: list[Choice], base: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a section's keys; keys that differ between the choices have a row for each meaning."""
    merged: dict[tuple[str, str, str], list[Key]] = {}
    for key in own:
        leaf = key.name.rpartition(".")[2]
        if key.name != key.tag:  # the choice sets it
            kind = kind_of(key.section.model_json_schema()["properties"][leaf])
            merged.setdefault((key.name, kind, key.meaning), []).append(key)
    rows: list[tuple[str, ...]] = []
    for (name, kind, meaning), alike in merged.items():
        tags = {tag for key in alike for tag in key.tags}
        having = [one for one in choices if not tags or tag_of(one) in tags]
        said = escaped(meaning)
        if len(having) < len(choices):
            names = tags if tags <= {one.name for one in choices} else {one.name for one in having}
            said += f" With {', '.join(f'`{one}`' for one in sorted(names))}."
        rows.append((f"`{name}`", default_of(alike[0], having, base), said, kind))
    return rows


def tag_of(choice: Choice) -> Any:
    return choice.values.get("kind", choice.values.get("name"))


def default_of(key: Key, choices: list[Choice], base: Mapping[str, Any]) -> str:
    """Return the value that configs/ gives a key, with the choices that differ from the most common one."""
    path = key.name.split(".")
    if not choices:
        return value_text(value_at(base, path, key.default))
    given: dict[str, list[str]] = {}
    for choice in choices:
        given.setdefault(value_text(value_at(choice.values, path[1:], key.default)), []).append(choice.name)
    if len(given) > MOST_DEFAULTS or (len(given) > 1 and given == {f"`{one.name}`": [one.name] for one in choices}):
        return "the choice's"
    most, *others = sorted(given, key=lambda text: -len(given[text]))
    named = [f"{text} with {', '.join(given[text])}" for text in (most, *others)]
    return "<br>".join([most if not others or len(given[most]) > 1 else named[0], *named[1:]])


def value_at(values: Any, path: list[str], default: Any) -> Any:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return default
        values = values[name]
    return values


def value_text(value: Any) -> str:
    """Return a default as code, as the command line takes it; "required" for a key without one."""
    if value is PydanticUndefined:
        return "required"
    return f"`{plain(value)}`" if value != "" else "empty"


def plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {plain(one)}" for name, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(plain, value))}]"
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}$", r"\1…", text)  # a commit


def kind_of(schema: Mapping[str, Any]) -> str:
    """Return the type of a key in words, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(kind_of(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return f"{kind} {', '.join(bounds(schema))}".strip()
    if kind == "array" and "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {kind_of(schema['prefixItems'][0])}"
    if kind == "array":
        return f"list: {kind_of(schema['items'])}"
    return {"boolean": "`true`, `false`", "null": "`null`", "object": "mapping", "string": "text"}[str(kind)]


def bounds(schema: Mapping[str, Any]) -> list[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": "&gt;", "maximum": "≤", "exclusiveMaximum": "&lt;"}
    return [f"{sign} {plain(schema[name])}" for name, sign in signs.items() if schema.get(name, MAX_INT) != MAX_INT]


def commands(root: Path) -> str:
    """Return the page of the commands with their options, and of make's targets."""
    lines = ["# Commands", ""]
    for title, paths in COMMANDS.items():
        lines += [f"## {title}", ""]
        for path in paths:
            text = (root / path).read_text(encoding="utf-8")
            lines += [f"### `{path}`", "", described(text, path), ""]
            if path.endswith(".py") and (options := options_of(ast.parse(text))):
                lines += table(("option", "meaning"), options)
    targets = re.findall(r"^([a-z-]+):.*?## (.*)$", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    lines += [
        "## make",
        "",
        *table(("target", "what it does"), ((f"`make {name}`", escaped(said)) for name, said in targets)),
    ]
    return "\n".join(lines)


def described(text: str, path: str) -> str:
    """Return what a command says about itself: its docstring, or the comment at the top of a shell script."""
    if not path.endswith(".py"):
        comments = re.findall(r"^#(?!!|SBATCH) ?(.*)$", text.partition("\n\n")[0], re.MULTILINE)
        return "\n".join(["```text", *comments, "```"])
    said = ast.get_docstring(ast.parse(text)) or ""
    return "\n".join(line if line.startswith("    ") else escaped(line) for line in said.splitlines())


def options_of(tree: ast.AST) -> list[tuple[str, str]]:
    """Return the arguments that a script adds to its parser, with their help."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [str(one.value) for one in node.args if isinstance(one, ast.Constant)]
            given = {one.arg: one.value for one in node.keywords}
            parts = getattr(given.get("help"), "values", [given.get("help")])  # of an f-string
            said = "".join(str(one.value) if isinstance(one, ast.Constant) else "…" for one in parts if one is not None)
            choices = ast.literal_eval(given["choices"]) if isinstance(given.get("choices"), ast.Tuple) else ()
            allowed = f"{', '.join(f'`{one}`' for one in choices)}" if choices else ""
            found.append((", ".join(f"`{name}`" for name in names), ": ".join(filter(None, (escaped(said), allowed)))))
    return found


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *rows]
    return [*(f"| {' | '.join(one.replace('|', '&#124;') for one in row)} |" for row in cells), ""]


def paragraph(text: str) -> str:
    return escaped(" ".join(text.partition("\n\n")[0].split()))


def escaped(text: str) -> str:
    """Return text in which angle brackets outside code do not become HTML."""
    pieces = text.split("`")
    return "`".join(one if number % 2 else one.replace("<", "&lt;") for number, one in enumerate(pieces))
