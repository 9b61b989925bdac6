"""From command-line overrides to a validated RunConfig: Hydra's one place in the project.

Hydra's composition errors and pydantic's validation errors become one line each: the key, the value, the remedy.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pydantic
from hydra import compose as hydra_compose
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from training.config import ConfigurationError, RunConfig
from training.records import CONFIG_FILE, ENVIRONMENT_FILE
from training.secrets import redacted, secret_in

# Hydra's own, and those of its plugin packages (joblib, submitit): nothing else may be made of a configuration.
PLUGIN_SECTIONS = ("hydra.launcher", "hydra.sweeper")
PLUGIN_MODULES = ("hydra._internal.core_plugins.", "hydra_plugins.")
# What configs/config.yaml sets of Hydra's, for a record, which has nothing of the kind: it writes no files of its own.
QUIET = (
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=${output_dir}/.sweep",
    "hydra.sweep.subdir=.",
)
CONFIG_DIRECTORY = Path(__file__).resolve().parent.parent / "configs"


class Primary(NamedTuple):
    """The file that a configuration begins with: `<directory>/<name>.yaml`. Groups are found in it and in `configs`."""

    name: str = "config"
    directory: Path = CONFIG_DIRECTORY

    @property
    def file(self) -> Path:
        return self.directory / f"{self.name}.yaml"

    @property
    def is_record(self) -> bool:
        """Whether it is the configuration that a run has left: every value resolved, and no defaults list."""
        return self.file.name == CONFIG_FILE and (self.directory / ENVIRONMENT_FILE).is_file()


PROJECT = Primary()


def compose(overrides: Sequence[str] = (), primary: Primary = PROJECT) -> RunConfig:
    """The validated configuration of `configs/config.yaml`, or another file, under Hydra overrides.

    Raises:
        ConfigurationError: one line that names the key, the value and the remedy.
    """
    return validate(compose_dictionary(overrides, primary))


def begin_hydra(primary: Primary = PROJECT) -> Hydra:
    """A fresh Hydra that knows where configurations lie, as its global instance; `GlobalHydra.clear` ends it."""
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    path = create_config_search_path(str(primary.directory))
    if primary.directory != CONFIG_DIRECTORY:
        path.prepend("project", f"file://{CONFIG_DIRECTORY}", "schema")  # Hydra wants its schema to be the last
    return Hydra.create_main_hydra2("sophia", path)


def compose_dictionary(overrides: Sequence[str], primary: Primary = PROJECT) -> dict[str, Any]:
    """Hydra's composition as a plain, resolved dictionary, not yet validated.

    Raises:
        ConfigurationError: it cannot be composed, or it would have Hydra call what is none of its own plugins.
    """
    outer = GlobalHydra.instance().hydra  # inside a Hydra job (multirun) another Hydra is already initialised
    try:
        begin_hydra(primary)
        config = hydra_compose(primary.name, overrides=made_again(primary, overrides), return_hydra_config=True)
        refuse_foreign_code(config)
        values = resolved(config)
        return launched_here(values) if primary.is_record else values
    except ConfigurationError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra's, of model=null
        raise ConfigurationError(redacted(reword_composition_error(error, overrides, primary))) from error
    except RecursionError:
        raise ConfigurationError(
            f"{primary.file}: its defaults list leads back to itself; give the file another name than that on which it builds"
        ) from None
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = outer


def made_again(primary: Primary, overrides: Sequence[str]) -> list[str]:
    """The overrides that a configuration is composed under: a record's run begins at step 0 and replaces nothing.

    Raises:
        ConfigurationError: another seed for a record, which holds the seeds that follow from its own.
    """
    if not primary.is_record:
        return list(overrides)
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    if "seed" in keys and not {"seeds.model", "seeds.data", "seeds.curvature"} <= {*keys}:
        raise ConfigurationError(
            f"seed: {primary.file} holds the seeds that followed from its own, so that another would change the label alone; "
            "give seeds.model=, seeds.data= and seeds.curvature= too"
        )
    return ["resume=auto", "overwrite=false", *QUIET, *overrides]


def launched_here(values: dict[str, Any]) -> dict[str, Any]:
    """A record's values with its ranks started on this machine: SLURM's launcher is Hydra's, of which a record has none."""
    launcher = values.get("launcher")
    if isinstance(launcher, Mapping) and launcher.get("name") not in ("local", "joblib"):
        values["launcher"] = {"name": "local", "nproc_per_node": launcher.get("nproc_per_node", 1)}
    return values


def resolved(config: DictConfig) -> dict[str, Any]:
    """The plain dictionary of a composed configuration, interpolations resolved, Hydra's own node dropped."""
    ours = [str(key) for key in config if key not in ("hydra", "experiment", "study")]
    container = OmegaConf.to_container(OmegaConf.masked_copy(config, ours), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def refuse_foreign_code(config: DictConfig) -> None:
    """Refuse a composition in whose `hydra` node something else than Hydra's own plugins is named.

    Hydra makes objects of what stands there under `_target_`, and logging of classes and factories: launcher, sweeper,
    callbacks and handlers.

    Raises:
        ConfigurationError: naming the first such key.
    """
    node = OmegaConf.to_container(config, resolve=False)
    assert isinstance(node, dict)
    for path, value in _leaves(node.get("hydra") or {}, "hydra"):
        section, _, leaf = path.rpartition(".")
        named = str(value)
        foreign = leaf == "_target_" and not (section in PLUGIN_SECTIONS and named.startswith(PLUGIN_MODULES))
        if section.startswith(("hydra.job_logging", "hydra.hydra_logging")):
            foreign |= leaf == "()" or (leaf == "class" and not named.startswith("logging."))
            foreign |= named.startswith(("ext://", "cfg://")) and named not in ("ext://sys.stdout", "ext://sys.stderr")
        if foreign:
            raise ConfigurationError(
                f"{path}={named}: names code outside of this project, which no configuration may; remove it, and choose "
                "launchers with launcher="
            )


def _leaves(values: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and their plain values, members of lists included."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _leaves(value, path)
    else:
        yield path, values


def validate(values: Mapping[str, Any]) -> RunConfig:
    """The frozen configuration of plain values, or a ConfigurationError of one line."""
    try:
        config = RunConfig.model_validate(dict(values))
    except pydantic.ValidationError as error:
        raise ConfigurationError(redacted(reword_validation_error(error))) from error
    for key, value in _leaves(config.model_dump(mode="json"), ""):
        if not isinstance(value, str):
            continue
        if any(unicodedata.category(character) == "Cc" for character in value):
            raise ConfigurationError(f"{key}={value!r}: has a control character, such as a line's end; leave it out")
        if name := secret_in(value):
            raise ConfigurationError(
                f"{key}: holds {name} in the clear, and would be written to {CONFIG_FILE}; set it in the environment where the "
                "run starts, or in ~/.netrc"
            )
    return config


def reword_composition_error(error: Exception, overrides: Iterable[str], primary: Primary = PROJECT) -> str:
    """One line for Hydra's composition errors."""
    text = str(error)
    chain = f"{text}\n{error.__cause__ or ''}"
    if match := re.search(r"Could not find '([^']+)/([^']+)'", text):
        group, choice = match.groups()
        options = group_options(group)
        return f"{group}={choice}: there is no such choice{did_you_mean(choice, options)}; choose one of {', '.join(options)}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        if re.search(r"No match in the defaults list", text):
            if key in config_groups():
                return (
                    f"{key}: {primary.file} chooses from no configuration groups, it holds values; set single keys, "
                    f"{key}.<key>=..., or begin with another file"
                )
            return f"{key}: there is no such configuration group; choose one of {', '.join(config_groups())}"
        return f"{key}: unknown key{did_you_mean_key(key)}"
    if match := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", chain):
        return f"{match.group(2)}: unknown key{did_you_mean_key(match.group(2))}"
    if re.search(
        r"mismatched input|extraneous input|token recognition|LexerNoViableAlt|no viable alternative|parsing override",
        chain,
    ):
        culprit = next((o for o in overrides if o in text), "the command line")
        return f"{culprit}: not an override; write key=value, and quote lists: 'optimizer.betas=[0.9,0.95]'"
    if "Config group override must be" in text:
        pairs = [override.lstrip("+").partition("=")[::2] for override in overrides]
        for group, value in pairs:
            if group in config_groups() and value not in group_options(group):
                return f"{group}={value}: no name of a choice; choose one of {', '.join(group_options(group))}"
    first_line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return first_line


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
    """A value as one line, of no more than two hundred characters."""
    text = "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in str(value))
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
    if key in known_keys():
        return f"; it belongs to another choice of {section}, see configs/{section}/"
    siblings = {k.rpartition(".")[2] for k in known_keys() if k.rpartition(".")[0] == section}
    if near := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6):
        return f"; did you mean {section + '.' if section else ''}{near[0]}?"
    if near := difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.6):
        return f"; did you mean {near[0]}?"
    return f"; known keys{' of ' + section if section else ''}: {', '.join(sorted(siblings)) or 'none'}"


def did_you_mean(choice: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(choice, options, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
