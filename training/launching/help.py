"""What --help and --cfg job say of a configuration: every key with its value and its meaning.

The meaning of a key is the line below it in training/config.py. It is read from the source when it is asked for, since no
run needs it.
"""

import ast
import functools
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from training import config
from training.config import RunConfig
from training.mistakes import OTHER_COMMANDS, config_groups, group_options, sections_of, tags_of

USAGE = """\
Train a GPT-2.

  python train.py [group=choice] [key=value] ...     one run
  torchrun --nproc_per_node=8 train.py ...           the same on eight ranks
  python train.py -m optimizer=adamw,lion seed=0,1   a sweep: all combinations
  python train.py ... --help                         this text for that run
  python train.py ... --cfg job                      its keys as YAML
  python train.py --hydra-help                       Hydra's flags

Lists go in quotes: 'optimizer.betas=[0.9,0.95]'."""
LONGEST_KEY = 36  # characters of key=value beside which the meaning stands


class Key(NamedTuple):
    """A key that a configuration may have, in all choices of its group or in some."""

    name: str  # dotted, as on the command line
    meaning: str
    default: Any  # PydanticUndefined where the key must be given; configs/ may set another
    tag: str  # the key that tells the choices apart, optimizer.name for example; "" where all have this key
    tags: tuple[str, ...]  # its values in the choices that have this key


def keys(
    model: type[BaseModel] = RunConfig, prefix: str = "", tag: str = "", tags: tuple[str, ...] = ()
) -> Iterator[Key]:
    """Every key that some configuration may have, in the order of training/config.py."""
    for name, field in model.model_fields.items():
        sections = sections_of(field.annotation)
        if not sections:
            yield Key(prefix + name, meaning(model, name), field.get_default(call_default_factory=True), tag, tags)
        for section in sections:
            if field.discriminator is None:
                yield from keys(section, f"{prefix}{name}.", tag, tags)
            else:
                told_by = f"{prefix}{name}.{field.discriminator}"
                yield from keys(section, f"{prefix}{name}.", told_by, tags_of(section))


def meaning(model: type[BaseModel], key: str) -> str:
    """The line below a key of a section.

    Raises:
        KeyError: there is none.
    """
    for owner in model.__mro__:
        if key in inspect.get_annotations(owner):
            return _lines()[owner.__name__, key]
    raise KeyError(key)


@functools.cache
def _lines() -> dict[tuple[str, str], str]:
    """The string that follows each annotated name, by class and name."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(Path(config.__file__).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for key, line in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(key, ast.AnnAssign)
                and isinstance(key.target, ast.Name)
                and isinstance(line, ast.Expr)
                and isinstance(line.value, ast.Constant)
            ):
                found[node.name, key.target.id] = str(line.value.value)
    return found


def of_this_run(values: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, str]], dict[str, str]]:
    """Values and meanings of the keys that a composed configuration has; meanings of those that other choices have."""
    own: dict[str, tuple[Any, str]] = {}
    others: dict[tuple[str, str], list[Key]] = {}
    for key in keys():
        if not key.tag or _value(values, key.tag) in key.tags:
            own[key.name] = (_value(values, key.name, key.default), key.meaning)
        else:
            others.setdefault((key.name, key.meaning), []).append(key)
    elsewhere: dict[str, list[str]] = {}
    for (name, said), alike in others.items():
        if name not in own:
            chosen = ", ".join(tag for key in alike for tag in key.tags)
            elsewhere.setdefault(name, []).append(f"{said} With {alike[0].tag.removesuffix('.name')}={chosen}.")
    return own, {name: " ".join(meanings) for name, meanings in elsewhere.items()}


def _value(values: Any, name: str, default: Any = None) -> Any:
    for part in name.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return default
        values = values[part]
    return values


def help_text(values: Mapping[str, Any], width: int | None = None) -> str:
    """Usage, groups with their choices, and every key by section, those of the composed configuration with its values.

    Args:
        values: the composed configuration.
        width: characters of a line; the terminal's by default.
    """
    width = width or min(shutil.get_terminal_size().columns, 140)
    lines = [USAGE, "", "Groups and their choices, group=choice:", ""]
    groups = [group for group in config_groups() if group not in OTHER_COMMANDS]
    for group in groups:
        lines += _row(group, ", ".join(group_options(group)), max(map(len, groups)), width)
    own, elsewhere = of_this_run(values)
    tags = {key.tag for key in keys()}  # of a group's choice, which group=choice sets with all that belongs to it
    rows = {name: (f"{name}={_text(value)}", said) for name, (value, said) in own.items() if name not in tags}
    rows |= {name: (name, said) for name, said in elsewhere.items()}
    lines += ["", "Keys, key=value:"]
    for section in dict.fromkeys(name.partition(".")[0] if "." in name else "" for name in rows):
        lines.append("")
        for name, (left, said) in rows.items():
            if section == (name.partition(".")[0] if "." in name else ""):
                lines += _row(left, said, LONGEST_KEY, width)
    return "\n".join(lines)


def _row(left: str, right: str, column: int, width: int) -> list[str]:
    """`left`, and `right` in a column of its own, below where `left` reaches into it."""
    wrapped = textwrap.wrap(right, max(width - column - 4, 24), break_on_hyphens=False)
    if len(left) > column:
        return [f"  {left}", *(" " * (column + 4) + line for line in wrapped)]
    return [f"  {left:<{column}}  {wrapped[0]}", *(" " * (column + 4) + line for line in wrapped[1:])]


def _text(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_text, value))}]"
    return str(value)


def annotated(text: str) -> str:
    """A composed configuration as YAML, each key's meaning a comment at the end of its line."""
    lines = text.splitlines()
    own, _ = of_this_run(yaml.safe_load(text))
    for name, line in _lines_of_keys(yaml.compose(text)):
        if name in own:
            lines[line] += f"  # {own[name][1]}"
    return "\n".join(lines)


def _lines_of_keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Keys and the lines that they begin, but for values of several lines, in which a comment would be text."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not (isinstance(value, yaml.ScalarNode) and value.end_mark.line > key.start_mark.line):
                yield prefix + key.value, key.start_mark.line
            yield from _lines_of_keys(value, f"{prefix}{key.value}.")
