"""The wording of mistakes: what Hydra, OmegaConf and pydantic say of a configuration as one line with a remedy."""

import difflib
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pydantic
from hydra.errors import OverrideParseException
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel

from training.config import RunConfig
from training.config_files import CONFIG_DIRECTORY
from training.secrets import redacted

# What Hydra says of a composition, and what OmegaConf says of a value: in the words of a remedy.
COMPOSITION_ERRORS = {
    r"Ambiguous value for argument '(.+)'": r"\1: several values; sweep over them with -m, or put them in quotes or brackets",
    r"Sweep parameters '(.+)' requires": r"\1: several values; sweep over them with -m",
    r"An item is already at '([^']+)'": r"\1: is there already; write \1=... to change it",
    r"Could not delete '([^']*)'": r"~\1: there is nothing to remove; leave it out",
    r"Could not delete from config. '([^']*)'": r"~\1: there is nothing to remove; leave it out",
    r"No config source registered for schema (\w+)": r"hydra.searchpath: \1://: no place for files; give [file:///...]",
    r"In '([^']+)': Could not load '([^']+)'": r"\1.yaml: its defaults list names \2, which is no file; correct the name",
}
VALUE_ERRORS = {
    r"Cannot merge": "a list or value where a section is expected, or the reverse; write it as in "
    f"{CONFIG_DIRECTORY / 'config.yaml'}",
    r"Unsupported interpolation type (\S+)": r"${\1:...}: there is no such resolver; use oc.env, oc.select or oc.decode",
    r"Recursive interpolation": "its ${...} leads back to itself; give it a value",
    r"Interpolation key '(.*)' not found": r"${\1}: there is no such key; give a value, or the dotted name of a key",
    r"HydraConfig was not set": "${hydra:...} is known in a sweep alone; give a value",
}


def reword_composition_error(error: Exception, overrides: Iterable[str], file: Path) -> str:
    """One line for Hydra's composition errors; `file` is that with which the configuration begins."""
    text = str(error)
    chain = f"{text}\n{error.__cause__ or ''}"
    if match := re.search(r"Could not find '([^']*)'", text):
        group, _, choice = match.group(1).partition("/")
        if group not in config_groups():
            group, _, choice = match.group(1).rpartition("/")
        options = group_options(group) or re.findall(r"^\t([\w/]+)$", text, re.MULTILINE)
        choose = f"choose one of {', '.join(options)}" if options else f"give the name of one, as in {CONFIG_DIRECTORY}"
        return f"{group}={choice}: there is no such choice{did_you_mean(choice, options)}; {choose}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        if re.search(r"No match in the defaults list", text):
            if key in config_groups():
                return (
                    f"{key}: {file} chooses from no configuration groups, it holds values; set single keys, "
                    f"{key}.<key>=..., or begin with another file"
                )
            return f"{key}: there is no such configuration group; choose one of {', '.join(config_groups())}"
        return f"{key}: unknown key{did_you_mean_key(key)}"
    if match := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", chain):
        return f"{match.group(2)}: unknown key{did_you_mean_key(match.group(2))}"
    if isinstance(error, OverrideParseException):
        return not_an_override(error.override)
    if "Config group override must be" in text:
        pairs = [override.lstrip("+").partition("=")[::2] for override in overrides]
        for group, value in pairs:
            if group in config_groups() and value not in group_options(group):
                return f"{group}={value}: no name of a choice; choose one of {', '.join(group_options(group))}"
        if any(key_of(one) == "hydra" for one in overrides):
            return "hydra: a section, not a value; set one of its keys"
        return not_an_override(next((one for one in overrides if not key_of(one)), "the command line"))
    for said, meant in COMPOSITION_ERRORS.items():
        if match := re.search(said, text):
            return shown(match.expand(meant))
    if match := re.search(r"In '([^']+)': \w+ raised while composing config", text):
        return f"{match.group(1)}.yaml: {omegaconf_problem(error)}"
    if any(isinstance(one, OmegaConfBaseException) for one in causes(error)):
        return omegaconf_problem(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def not_an_override(override: str) -> str:
    """One line for what Hydra cannot read, with the form in which it could where that is plain."""
    key, _, value = override.partition("=")
    if re.fullmatch(r"[+~]*[\w./@-]+", key, re.ASCII) and value and value[0] not in "[{'\"":
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        given = shown(f"{key}='{escaped}'")
        given = shlex.quote(given) if re.search(r'["$`!\\]', given) else f'"{given}"'  # as one types it in a shell
        return f"{shown(override)}: not an override; put the value in quotes: {given}"
    remedy = "write key=value, and quote lists and text in them, as in 'optimizer.betas=[0.9,0.95]' \"data.paths=['a b.txt']\""
    return f"{shown(override) or repr(override)}: not an override; {remedy}"


def omegaconf_problem(error: BaseException) -> str:
    """The first line of OmegaConf's own error, with the key."""
    ours = [one for one in causes(error) if isinstance(one, OmegaConfBaseException)]
    said = next((line.strip() for line in str(ours[-1]).splitlines() if line.strip()), type(ours[-1]).__name__)
    key = next((str(one.full_key) for one in ours if one.full_key), "")
    if isinstance(ours[-1], GrammarParseError):
        said = f"its ${{...}} cannot be read ({said}); close the brace, or quote text with '\\${{'"
    said = re.sub(r"^\w+ raised while resolving interpolation: ", "", said)
    for pattern, meant in VALUE_ERRORS.items():
        if match := re.search(pattern, said):
            said = match.expand(meant)
            break
    return shown(f"{key}: {said}" if key else said)


def config_groups() -> list[str]:
    return sorted(path.name for path in CONFIG_DIRECTORY.iterdir() if path.is_dir())


def group_options(group: str) -> list[str]:
    """The choices of a configuration group, nested ones as `folder/name`."""
    root = CONFIG_DIRECTORY / group
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def reword_validation_error(error: pydantic.ValidationError) -> str:
    """One line for the first of pydantic's errors (unknown keys before anything else: they often cause the rest)."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    key = dotted_key(first["loc"])
    given = shown(first["input"])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    kind = first["type"]
    if kind == "extra_forbidden":
        key = key or "''"
        return f"{key}={given}: unknown key{did_you_mean_key(key, first['loc'])}{more}"
    if kind == "value_error":
        return f"{first['msg'].removeprefix('Value error, ')}{more}"
    if kind == "missing":
        return f"{key}: missing; give it a value, {key}=...{more}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = first.get("ctx", {}).get("discriminator", "name").strip("'")
        value = shown(first["input"].get(tag)) if isinstance(first["input"], dict) else given
        expected = first.get("ctx", {}).get("expected_tags", "")
        return f"{key}.{tag}={value}: expected one of {expected or 'the known names'}; choose with {key}=<name>{more}"
    return f"{key}={given}: {expectation(first)}{more}"


def shown(value: Any) -> str:
    """A value as one line, of no more than two hundred characters and without secrets."""
    # Hidden before the cut, of which a secret would leave its head.
    text = "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") else c for c in redacted(str(value)))
    return text if len(text) <= 200 else f"{text[:200]}…"


def expectation(error: Any) -> str:
    """What pydantic expected, in the words of a remedy."""
    context = error.get("ctx", {})
    kind = error["type"]
    limits = {"greater_than": ("gt", "above"), "greater_than_equal": ("ge", "at least"), "less_than": ("lt", "below")}
    limits["less_than_equal"] = ("le", "at most")
    if kind in limits:
        bound, word = limits[kind]
        return f"out of range; give a number {word} {context[bound]}"
    if kind in ("float_parsing", "float_type", "finite_number"):
        return "not a finite number; give a number such as 6e-4"
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return "not a whole number; give one such as 100"
    if kind in ("bool_parsing", "bool_type"):
        return "not a switch; give true or false"
    if kind == "literal_error":
        return f"not a known value; choose one of {context['expected']}"
    if kind == "string_pattern_mismatch":
        return "not a valid name; use letters, digits, '.', '_' and '-', beginning with a letter or digit"
    if kind == "string_too_long":
        return f"too long; give at most {context['max_length']} characters"
    if kind in ("too_short", "tuple_type", "too_long"):
        length = context.get("min_length", context.get("max_length", ""))
        return f"a list of {length or 'other'} length or type is expected; for example '[...]'".replace("  ", " ")
    if kind in ("model_type", "dict_type"):
        return "a section, not a value; set one of its keys"
    if kind == "string_type":
        return "not text; quote it: key='\"1\"'"
    return f"{error['msg']}; see configs/ for a valid value"


def dotted_key(location: Sequence[int | str]) -> str:
    """`optimizer.lr` of pydantic's location, without the tags of its unions."""
    parts: list[str] = []
    model: Any = RunConfig
    for part in location:
        fields = getattr(model, "model_fields", None)
        if fields is None and isinstance(model, tuple):
            tagged = [m for m in model if part in get_args(getattr(m.model_fields.get("name"), "annotation", None))]
            tagged += [m for m in model if part in get_args(getattr(m.model_fields.get("kind"), "annotation", None))]
            if tagged:
                model = tagged[0]
                continue
        parts.append(str(part))
        field = fields.get(part) if fields else None
        model = section_of(field.annotation) if field is not None else None
    return ".".join(
        p for p in parts if p not in ("bool", "int", "float") and not p.startswith(("literal[", "constrained-"))
    )


def section_of(annotation: Any) -> Any:
    """The model class of a field, a tuple of classes for a union, None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    members = tuple(a for a in get_args(annotation) if isinstance(a, type) and issubclass(a, BaseModel))
    return members or None


def known_keys(model: Any = RunConfig, prefix: str = "") -> set[str]:
    """Every key that some configuration may have, dotted."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(prefix + name)
        section = section_of(field.annotation)
        for member in section if isinstance(section, tuple) else [section] if section else []:
            keys |= known_keys(member, f"{prefix}{name}.")
    return keys


def did_you_mean_key(key: str, location: Sequence[int | str] = ()) -> str:
    """The nearest known key, preferring the section's own; or the section's keys."""
    section, _, leaf = key.rpartition(".")
    if any("." in str(part) for part in location):
        return f"; nest it, {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
    if key in config_groups():
        return f"; choose one with {key}=<name>: {', '.join(group_options(key))}"
    if key in known_keys():
        if section in config_groups():
            return f"; it belongs to another choice of {section}, see configs/{section}/"
        return f"; the files leave out {section or key}, or give it one value; correct that, or set it with ++{key}=..."
    siblings = {k.rpartition(".")[2] for k in known_keys() if k.rpartition(".")[0] == section}
    if near := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6):
        return f"; did you mean {section + '.' if section else ''}{near[0]}?"
    if near := difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.6):
        return f"; did you mean {near[0]}?"
    return f"; known keys{' of ' + section if section else ''}: {', '.join(sorted(siblings)) or 'none'}"


def did_you_mean(choice: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(choice, options, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, that from which it was raised, and so on."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
