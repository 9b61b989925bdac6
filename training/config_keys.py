"""Every key of the configuration with its section, meaning and default, read from training/config.py.

--help, --cfg job, error messages and the site's reference of keys use it. The meaning of a key is the string below it in
training/config.py, read from the source because no run needs it. Importing this module needs pydantic alone.
"""

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from training import config
from training.config import RunConfig


class Key(NamedTuple):
    """A configuration key, which all or only some choices of its group have."""

    name: str  # dotted, as on the command line
    section: type[BaseModel]
    meaning: str
    default: Any  # PydanticUndefined if the key is required; configs/ may set another value
    tag: str  # the key that distinguishes the choices, such as optimizer.name; "" if all choices have this key
    tags: tuple[str, ...]  # the tag's values in the choices that have this key


def keys(
    model: type[BaseModel] = RunConfig, prefix: str = "", tag: str = "", tags: tuple[str, ...] = ()
) -> Iterator[Key]:
    """Yield every key of every choice, in the order of training/config.py."""
    for name, field in model.model_fields.items():
        sections = sections_of(field.annotation)
        if not sections:
            yield Key(
                prefix + name, model, meaning(model, name), field.get_default(call_default_factory=True), tag, tags
            )
        for section in sections:
            if field.discriminator is None:
                yield from keys(section, f"{prefix}{name}.", tag, tags)
            else:
                told_by = f"{prefix}{name}.{field.discriminator}"
                yield from keys(section, f"{prefix}{name}.", told_by, tags_of(section))


def meaning(model: type[BaseModel], key: str) -> str:
    """Return the string below a key of a section.

    Raises:
        KeyError: the key has none.
    """
    for owner in model.__mro__:
        if key in inspect.get_annotations(owner):
            return _lines()[owner.__name__, key]
    raise KeyError(key)


@functools.cache
def _lines() -> dict[tuple[str, str], str]:
    """Map (class, key) to the string that follows the key in the source."""
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


def sections_of(annotation: Any) -> tuple[type[BaseModel], ...]:
    """Return the model class of a field, or those of its union; none for a plain value."""
    return tuple(a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel))


def tags_of(model: type[BaseModel]) -> tuple[Any, ...]:
    """Return the names, or kinds, that select the model in its union."""
    field = model.model_fields.get("kind") or model.model_fields.get("name")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
