"""The text of --help and --cfg job: every key of a configuration with its value and meaning.

The meanings are those of training/config_keys.py.
"""

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from training.config_keys import Key, keys
from training.mistakes import OTHER_COMMANDS, config_groups, group_options, shown
from training.records import flatten

USAGE = """\
Train a GPT-2.

  python train.py [group=choice] [key=value] ...     one run
  torchrun --nproc_per_node=8 train.py ...           the same on eight ranks
  python train.py -m optimizer=adamw,lion seed=0,1   a sweep: all combinations
  python train.py ... --help                         this text for that run
  python train.py ... --cfg job                      its keys as YAML
  python train.py --hydra-help                       Hydra's flags

Lists go in quotes: 'optimizer.betas=[0.9,0.95]'."""
LONGEST_KEY = 36  # characters of key=value; longer ones have their meaning on the next line


def of_this_run(values: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, str]], dict[str, str]]:
    """Return value and meaning of each key of a composed configuration, and the meanings of the other choices' keys."""
    given = flatten(values)
    for section, inside in values.items():  # mappings that are values, such as optimizer.arguments
        given |= {f"{section}.{key}": value for key, value in inside.items()} if isinstance(inside, Mapping) else {}
    own: dict[str, tuple[Any, str]] = {}
    others: dict[tuple[str, str], list[Key]] = {}
    for key in keys():
        if not key.tag or given.get(key.tag) in key.tags:
            own[key.name] = (given.get(key.name, key.default), key.meaning)
        else:
            others.setdefault((key.name, key.meaning), []).append(key)
    elsewhere: dict[str, list[str]] = {}
    for (name, said), alike in others.items():
        if name not in own:
            chosen = ", ".join(tag for key in alike for tag in key.tags)
            elsewhere.setdefault(name, []).append(f"{said} With {alike[0].tag.removesuffix('.name')}={chosen}.")
    return own, {name: " ".join(meanings) for name, meanings in elsewhere.items()}


def help_text(values: Mapping[str, Any], width: int | None = None) -> str:
    """Return usage, groups with their choices, and all keys by section, with values where the configuration has the key.

    Args:
        values: the composed configuration.
        width: characters per line; the terminal's width by default.
    """
    width = width or min(shutil.get_terminal_size().columns, 140)
    lines = [USAGE, "", "Groups and their choices, group=choice:", ""]
    groups = [group for group in config_groups() if group not in OTHER_COMMANDS]
    for group in groups:
        lines += _row(group, ", ".join(group_options(group)), max(map(len, groups)), width)
    own, elsewhere = of_this_run(values)
    tags = {key.tag for key in keys()}  # not listed: group=choice sets them, with the keys that belong to the choice
    rows = {name: (f"{name}={shown(value)}", said) for name, (value, said) in own.items() if name not in tags}
    rows |= {name: (name, said) for name, said in elsewhere.items()}
    lines += ["", "Keys, key=value:"]
    for section in dict.fromkeys(name.partition(".")[0] if "." in name else "" for name in rows):
        lines.append("")
        for name, (left, said) in rows.items():
            if section == (name.partition(".")[0] if "." in name else ""):
                lines += _row(left, said, LONGEST_KEY, width)
    return "\n".join(lines)


def _row(left: str, right: str, column: int, width: int) -> list[str]:
    """Format `left` and `right` in two columns. `right` starts on the next line if `left` is too long."""
    wrapped = textwrap.wrap(right, max(width - column - 4, 24), break_on_hyphens=False)
    if len(left) > column:
        return [f"  {left}", *(" " * (column + 4) + line for line in wrapped)]
    return [f"  {left:<{column}}  {wrapped[0]}", *(" " * (column + 4) + line for line in wrapped[1:])]


def annotated(text: str) -> str:
    """Append each key's meaning as a comment to its line of a composed configuration's YAML."""
    lines = text.splitlines()
    own, _ = of_this_run(yaml.safe_load(text))
    for name, line in _lines_of_keys(yaml.compose(text)):
        if name in own:
            lines[line] += f"  # {own[name][1]}"
    return "\n".join(lines)


def _lines_of_keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield keys and their line numbers, except for multi-line scalars, where a comment would become text."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not (isinstance(value, yaml.ScalarNode) and value.end_mark.line > key.start_mark.line):
                yield prefix + key.value, key.start_mark.line
            yield from _lines_of_keys(value, f"{prefix}{key.value}.")
