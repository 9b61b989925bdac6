"""Code that a configuration names, <module>:<callable>: import it, and check its keyword arguments without calling it.

Whether the configuration may name code at all is decided when it is composed (training/compose.py).
"""

import contextlib
import difflib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from training.config import ConfigurationError
from training.mistakes import shown

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def load(key: str, named: str) -> Callable[..., Any]:
    """Import a callable from an installed package or the current directory, which is searched first.

    Args:
        key: the configuration's, for messages.
        named: <module>:<callable>.

    Raises:
        ConfigurationError: there is no such module or name, importing it fails, or it is not callable. One line.
    """
    where = f"{key}={named}"
    module_name, _, path = named.partition(":")
    found: Any = _module(module_name, where)
    owner = module_name
    for name in path.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, [one for one in dir(found) if one[0] != "_"], n=1, cutoff=0.6)
            remedy = f"did you mean {near[0]}?" if near else "give the name of a class or function"
            raise ConfigurationError(f"{where}: no {name} in {owner}; {remedy}")
        found, owner = getattr(found, name), f"{owner}.{name}"
    if not callable(found):
        raise ConfigurationError(f"{where}: it is of type {type(found).__name__}; give a class or function")
    return found  # type: ignore[no-any-return]


def signature(factory: Any) -> dict[str, inspect.Parameter] | None:
    """Return a callable's parameters; None if Python cannot tell."""
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return None


def keywords(
    factory: Callable[..., Any],
    where: str,
    arguments: Mapping[str, Any],
    given: Mapping[str, Any],
    instead: Mapping[str, str],
) -> dict[str, Any]:
    """Return a factory's keyword arguments: the run's, where its signature takes them, and those configured, lists as tuples.

    Args:
        where: <group>.<key>=<module>:<callable>, for messages; the arguments are <group>.arguments.
        given: what the run gives.
        instead: arguments that are the run's to give, with what to set instead.

    Raises:
        ConfigurationError: an argument is unknown, is the run's to give, or is missing.
    """
    key, _, named = where.partition("=")
    section = f"{key.partition('.')[0]}.arguments"
    parameters = signature(factory)
    names = [name for name, one in (parameters or {}).items() if one.kind not in VARIADIC]
    takes_any = parameters is None or inspect.Parameter.VAR_KEYWORD in {one.kind for one in parameters.values()}
    own = [name for name in names if name not in instead]
    for name, value in arguments.items():
        written = f"{section}.{name}={shown(value)}"
        if name in instead:
            raise ConfigurationError(f"{written}: the run gives it; set {instead[name]}")
        near = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
        if name not in own and (near or not takes_any):
            meant = f"did you mean {near[0]}? It" if near else "it"
            raise ConfigurationError(f"{written}: no argument of {named}; {meant} takes {', '.join(own) or 'none'}")
    found = {name: value for name, value in given.items() if name in names or takes_any}
    found |= {name: _tuples(value) for name, value in arguments.items()}
    without_default = [name for name in own if parameters and parameters[name].default is inspect.Parameter.empty]
    if missing := [name for name in without_default if name not in found]:
        raise ConfigurationError(f"{where}: its argument {missing[0]} is missing; give {section}.{missing[0]}=")
    return found


def said(error: BaseException) -> str:
    """Return an error of somebody else's code as one line."""
    return shown(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _module(name: str, where: str) -> Any:
    with _current_directory_first():
        importlib.invalidate_caches()
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:
            missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
            if not missing or not f"{name}.".startswith(f"{missing}."):
                raise ConfigurationError(f"{where}: importing {name} fails: {said(error)}; correct it") from error
            package, _, leaf = missing.rpartition(".")
            path = getattr(sys.modules.get(package), "__path__", None) if package else None
            names = [one.name for one in pkgutil.iter_modules(path)] if path or not package else []
            near = difflib.get_close_matches(leaf, names, n=1, cutoff=0.7)
            remedy = "install it, or start in the directory that holds it"
            if near:
                remedy = f"did you mean {f'{package}.' if package else ''}{near[0]}?"
            raise ConfigurationError(f"{where}: no module {missing}; {remedy}") from error


@contextlib.contextmanager
def _current_directory_first() -> Iterator[None]:
    directory = os.getcwd()
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)


def _tuples(value: Any) -> Any:
    """YAML has lists where Python's signatures expect tuples."""
    if isinstance(value, Mapping):
        return {key: _tuples(member) for key, member in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
