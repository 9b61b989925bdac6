"""Read the YAML of configurations and studies. Any error is one line with file, line and column.

Values are parsed by OmegaConf's loader, for which 1e-3 is a number. Files hold plain values: text keys, no tags of other
types, and at most `MAX_VALUES` values after aliases are expanded.
"""

import copy
import functools
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from training.config import ConfigurationError

CONFIG_DIRECTORY = Path(__file__).resolve().parent.parent / "configs"
MAX_BYTES = 2**20
MAX_VALUES = 100_000
_LOADER = get_yaml_loader()
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
# PyYAML's messages and their remedies.
_REMEDIES = {
    r"character '\\t'": "indent with spaces",
    r"that cannot start any token": "put the value in quotes",
    r"mapping values are not allowed": "indent the line like its neighbours, or put a value with ': ' in quotes",
    r"could not find expected ':'": "write key: value, with a space after the colon",
    r"duplicate key": "keep one of the two",
    r"unexpected end of stream": "close the quote",
    r"another document|single document": "keep one document in a file",
    r"undefined alias": "put text that starts with '*' in quotes",
    r"expected <block end>": "indent the line like its neighbours",
    r"expected the node content": "give a value, and close brackets",
    r"expected ',' or": "close the bracket, and separate its members with commas",
}


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file, None if it is empty.

    Raises ConfigurationError if the file cannot be read, is not YAML, or holds more than plain values.
    """
    text = read_text(path)
    try:
        return copy.deepcopy(_values_of(text))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        column = error.position - text.rfind("\n", 0, error.position) - 1
        raise ConfigurationError(
            f"{_at(path, line, column)}: the character {chr(error.character)!r} is not allowed in YAML; remove it"
        ) from error
    except yaml.MarkedYAMLError as error:
        raise ConfigurationError(_reworded(path, error)) from error
    except RecursionError:
        raise ConfigurationError(f"{path}: nested too deeply; a configuration has a few levels") from None
    except ValueError as error:  # from !!int and !!float, and from numbers with thousands of digits
        raise ConfigurationError(f"{path}: {str(error).partition(';')[0]}; put text in quotes") from error


@functools.lru_cache(maxsize=128)
def _values_of(text: str) -> Any:
    """The values of a text, parsed once: a sweep and a study compose from the same files again and again."""
    loader = _LOADER(text)
    node = loader.get_single_node()
    if node is None:
        return None
    _refuse_more_than_values(node)
    return loader.construct_document(node)


def parse_value(override: str) -> Any:
    """Return the value of an override that Hydra does not see. Raises ConfigurationError if it is not YAML."""
    try:
        return _LOADER(override.partition("=")[2]).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{override}: not a value; close brackets and quotes") from error


def read_text(path: Path) -> str:
    """Return the text of a small UTF-8 file. Raises ConfigurationError if it is too large, not UTF-8, or unreadable."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if len(content) > MAX_BYTES:
        raise ConfigurationError(
            f"{path}: larger than {MAX_BYTES >> 20} MiB, too large for a configuration; give another file"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        place = _at(path, before.count(b"\n"), error.start - before.rfind(b"\n") - 1)
        raise ConfigurationError(
            f"{place}: the byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error


def _refuse_more_than_values(root: yaml.Node) -> None:
    """Refuse tags, keys that are not text, recursive aliases, and aliases that expand to too many values."""
    sizes: dict[int, int] = {}  # number of values in a node; 0 while its members are being counted

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise _problem("an alias refers to itself; remove it", node)
            return sizes[id(node)]
        if node.tag not in _TAGS:
            raise _problem(f"the tag {node.tag!r} is not allowed; write a plain value", node)
        sizes[id(node)] = 0
        members: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if not (key.tag.endswith((":str", ":merge")) and key.value.strip()):
                    shown = key.value if isinstance(key, yaml.ScalarNode) else "..."
                    raise _problem(f"the key {shown!r} is not text; put it in quotes, or give it a name", key)
                members.append(value)
        elif isinstance(node, yaml.SequenceNode):
            members = node.value
        total = 1 + sum(size(member) for member in members)
        if total > MAX_VALUES:
            raise _problem(f"more than {MAX_VALUES:,} values after its aliases are expanded; remove aliases", node)
        sizes[id(node)] = total
        return total

    size(root)


def _problem(text: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _reworded(path: Path, error: yaml.MarkedYAMLError) -> str:
    """Return one line: place, PyYAML's problem, what it was reading if that started on another line, and the remedy."""
    problem = error.problem or error.context or "not YAML"
    mark = error.problem_mark or error.context_mark
    assert mark is not None
    while_at = ""
    if error.context and error.problem and error.context_mark and error.context_mark.line != mark.line:
        while_at = f" ({error.context} that starts on line {error.context_mark.line + 1})"
    remedy = next(
        (f"; {remedy}" for said, remedy in _REMEDIES.items() if re.search(said, f"{problem} {error.context}")), ""
    )
    return f"{_at(path, mark.line, mark.column)}: {problem}{while_at}{remedy}"


def _at(path: Path, line: int, column: int) -> str:
    """Format a place, given zero-based line and column, with one-based numbers as in an editor."""
    return f"{path}, line {line + 1}, column {column + 1}"
