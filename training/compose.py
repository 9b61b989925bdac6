"""Compose command-line overrides into a validated RunConfig. Most of the project's use of Hydra is here.

Hydra's composition errors and pydantic's validation errors become one line each: the key, the value, the remedy.

Files outside `configs` may come from other people. They set the run's own keys; what Hydra does with a run (its `hydra`
node, and the shell commands of `launcher.setup`) is set only by the project's files and the command line.
"""

import contextlib
import functools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
from hydra import compose as hydra_compose
from hydra import version
from hydra._internal.core_plugins import file_config_source, importlib_resources_config_source
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.config import LAST_WITH_REMOVED, REMOVED, ConfigurationError, RunConfig, whole
from training.config_files import CONFIG_DIRECTORY, read_text, read_yaml
from training.mistakes import (
    OTHER_COMMANDS,
    causes,
    choices_named,
    config_groups,
    either,
    key_of,
    not_an_override,
    of_element,
    omegaconf_problem,
    reword_composition_error,
    reword_validation_error,
    shown,
    unquoted,
)
from training.records import CONFIG_FILE, ENVIRONMENT_FILE, flatten
from training.secrets import redacted, secret_in

# Hydra may instantiate its own plugins and those of its plugin packages (joblib, submitit), nothing else.
PLUGIN_SECTIONS = ("hydra.launcher", "hydra.sweeper")
PLUGIN_MODULES = ("hydra._internal.core_plugins.", "hydra_plugins.")
# The keys that set the shell commands of a job.
SETUP_KEYS = {"launcher.setup", "hydra.launcher.setup"}
# What `${oc.env:NAME}` may read. Values are written to the record, so credentials (such as SLURM_JWT) are excluded.
READABLE_VARIABLES = frozenset(
    (
        *("USER", "LOGNAME", "HOME", "HOSTNAME", "PWD", "TMPDIR", "CUDA_VISIBLE_DEVICES"),
        *("SCRATCH", "PSCRATCH", "SCRATCHDIR", "WORK", "WORKDIR", "PROJECT", "STORE", "XDG_CACHE_HOME", "HF_HOME"),
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS"),
        *("SLURM_CLUSTER_NAME", "SLURM_SUBMIT_DIR", "SLURM_TMPDIR"),
        *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
        *("SLURM_NNODES", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_PROCID", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE"),
    )
)
# Hydra's syntax in a value: lists, quotes, sweeps, interpolations. A value without it can safely be quoted.
_SYNTAX = re.compile(r"""[\\'"()\[\]{}$,]""")
# An override that Hydra can read without quotes. Calling its parser is slow.
_PLAIN = re.compile(r"\+{0,2}[a-zA-Z]\w*(\.\w+)*=[\w./+-]+", re.ASCII)
# Arguments of a factory have any names, and files of models and records lack keys; Hydra adds a key only with plus signs.
_ADDED = re.compile(r"((optimizer|model)\.arguments(\.[\w.]+)?|model\.architecture|allow_code)=", re.ASCII)
# The keys that name code to import.
CODE_KEYS = ("optimizer.factory", "model.architecture")
# An element of a list, as in optimizer.betas[0]=0.9.
_ELEMENT = re.compile(r"^(\+{0,2}[\w.]+)\[(\d+)\]=")


def readable_variable(name: str, *default: Any, _node_: Node) -> str | None:
    """OmegaConf's `oc.env`. ConfigurationError unless the variable is in `READABLE_VARIABLES`, and set or with a default."""
    key = _node_._get_full_key(None)
    if name not in READABLE_VARIABLES:
        raise ConfigurationError(
            f"{key}: reads the environment variable {shown(name)}, whose value would be written to {CONFIG_FILE}; leave "
            f"secrets in the environment, and let the shell expand other variables: {key}=$NAME"
        )
    if name not in os.environ and not default:
        raise ConfigurationError(
            f"{key}: the environment variable {name} is not set; set it, or give a default: ${{oc.env:{name},default}}"
        )
    value = os.environ.get(name, *default)
    return None if value is None else str(value)


# Global, since Hydra resolves the values of a sweep's trials, also in workers and jobs.
OmegaConf.register_new_resolver("oc.env", readable_variable, replace=True)
OmegaConf.register_new_resolver("whole", whole, replace=True)  # for the integers of Hydra's launchers
# For sbatch. Without the flag it depends on the cluster whether `scontrol requeue` and preemption requeue a job.
OmegaConf.register_new_resolver("requeue", lambda requeue: {"requeue" if requeue else "no_requeue": True}, replace=True)
for _unused in ("oc.create", "oc.deprecated", "oc.dict.keys", "oc.dict.values"):  # they return no plain values
    OmegaConf.clear_resolver(_unused)


class Primary(NamedTuple):
    """The primary configuration file, `<directory>/<name>.yaml`.

    Groups are searched in its directory, then in `configs`, then in `added`.
    """

    name: str = "config"
    directory: Path = CONFIG_DIRECTORY
    added: Path | None = None

    @property
    def file(self) -> Path:
        return self.directory / f"{self.name}.yaml"

    @property
    def is_record(self) -> bool:
        """Whether it is the configuration of a recorded run: all values resolved, no defaults list."""
        return self.file.name == CONFIG_FILE and os.path.isfile(self.directory / ENVIRONMENT_FILE)


PROJECT = Primary()


def compose(overrides: Sequence[str] = (), primary: Primary = PROJECT) -> RunConfig:
    """Compose and validate `configs/config.yaml`, or another primary file, with Hydra overrides.

    Raises ConfigurationError: one line with the key, the value and the remedy.
    """
    return validate(compose_dictionary(overrides, primary))


# Both classes have the names of Hydra's own: in a worker, Hydra registers its sources again but keeps names that exist.
class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's source of YAML files, with the project's reader and its restriction of files outside `configs`."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        if provider.startswith("hydra.searchpath") and not Path(self.path).is_dir():
            raise ConfigurationError(f"hydra.searchpath=[{shown(path)}]: no such directory; give one that holds files")

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path)).resolve()
        values = read_yaml(file)
        if values is None:
            values = {}
        if not isinstance(values, dict):
            said = f"the text {shown(values)!r}" if isinstance(values, str) else f"a {type(values).__name__}"
            raise ConfigurationError(
                f"{file}: holds {said} instead of keys and values; write lines of key: value, with a space after the colon"
            )
        defaults = values.get("defaults", [])
        if not isinstance(defaults, list) or not all(
            isinstance(item, str) or (isinstance(item, dict) and len(item) == 1) for item in defaults
        ):
            raise ConfigurationError(
                f"{file}: defaults: not a list with one choice per line; write for example '- override /optimizer: lion'"
            )
        header = ConfigSource._get_header_dict(read_text(file)[:512])
        if not file.is_relative_to(CONFIG_DIRECTORY):
            refuse_hydra_keys(file, config_path, header.get("package"), values)
        try:
            config = OmegaConf.create(values)
        except OmegaConfBaseException as error:
            raise ConfigurationError(f"{file}: {omegaconf_problem(error)}") from error
        return ConfigResult(config=config, path=f"file://{self.path}", provider=self.provider, header=header)


class ImportlibResourcesConfigSource(importlib_resources_config_source.ImportlibResourcesConfigSource):
    """Hydra's source of configurations in packages, for Hydra's own packages only: reading one imports it."""

    def __init__(self, provider: str, path: str) -> None:
        if provider.startswith("hydra.searchpath"):
            raise ConfigurationError(
                f"hydra.searchpath=[{shown(path)}]: would import a package; give a directory, file://..."
            )
        super().__init__(provider, path)


def refuse_hydra_keys(file: Path, config_path: str, package: str | None, values: Mapping[str, Any]) -> None:
    """Refuse a file outside `configs` that sets keys of Hydra's node by content, path, package or defaults list.

    The file may choose an installed launcher and repeat what the project's files say, as a copy of one does.

    Args:
        config_path: the file's path in its directory, `<group>/<choice>`.
        package: from its header: where its content goes in the configuration.
    """
    remedy = "which files outside configs/ may not set; give it on the command line"
    reached = [(f"its path, {config_path}", config_path.rpartition("/")[0]), (f"# @package {package}", package or "")]
    defaults = values.get("defaults")
    for item in defaults if isinstance(defaults, list) else []:
        for entry, choice in item.items() if isinstance(item, dict) else [(str(item), None)]:
            *words, group = str(entry).split(" ")
            group, _, place = group.partition("@")
            overriding = "override" in words and {*words} <= {"override", "optional"} and "/" not in str(choice)
            reached.append((f"defaults: {entry}", place if overriding else f"{group}/{place}"))
    for where, path in reached:
        if "hydra" in re.split(r"[./@:]", path) or "$" in path:
            raise ConfigurationError(f"{file}: {shown(where)}: a part of hydra, {remedy}")
    for key, value in _leaves(values.get("hydra", {}), "hydra"):
        if (key, value) not in _settings_of_hydra("config.yaml", "launcher/*.yaml"):
            raise ConfigurationError(f"{file}: {shown(key)}={shown(value)}: a key of hydra, {remedy}")


def refuse_hydra_overrides(overrides: Iterable[str], origin: str = "a job") -> None:
    """Raise ConfigurationError for overrides from a file (a study's) that set keys of Hydra's node."""
    for override in overrides:
        if "hydra" in re.split(r"[./@:]", key_of(override)):
            raise ConfigurationError(f"{origin}: {shown(override)}: a key of hydra; give it on the command line")


@functools.cache
def _settings_of_hydra(*patterns: str) -> frozenset[tuple[str, Any]]:
    """Return the keys and values of Hydra's node that the project's own files set."""
    files = (file for pattern in patterns for file in CONFIG_DIRECTORY.glob(pattern))
    return frozenset(leaf for file in files for leaf in _leaves(read_yaml(file).get("hydra", {}), "hydra"))


def start_hydra(primary: Primary = PROJECT) -> Hydra:
    """Create Hydra's global instance with the configuration directories; `GlobalHydra.clear` removes it."""
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    Plugins.instance()  # registers Hydra's sources, which ours replace
    SourcesRegistry.instance().types |= {"file": FileConfigSource, "pkg": ImportlibResourcesConfigSource}
    path = create_config_search_path(str(primary.directory))
    if primary.directory != CONFIG_DIRECTORY:
        path.prepend("project", f"file://{CONFIG_DIRECTORY}", "schema")  # Hydra requires its schema to be last
    if primary.added is not None:
        path.prepend("command-line", f"file://{primary.added}", "schema")
    return Hydra.create_main_hydra2("sophia", path)


def compose_dictionary(overrides: Sequence[str], primary: Primary = PROJECT) -> dict[str, Any]:
    """Compose a plain, resolved dictionary with Hydra, without validating it.

    Raises ConfigurationError if it cannot be composed, or Hydra would call something other than its plugins.
    """
    refuse_choices_by_name(overrides, primary)
    outer = GlobalHydra.instance().hydra  # inside a Hydra job (multirun) another Hydra is already initialised
    try:
        with worded_errors(overrides, primary):
            start_hydra(primary)
            config = hydra_compose(primary.name, hydra_overrides(primary, overrides), return_hydra_config=True)
            check_hydra(config, overrides)
            values = resolved(config)
            refuse_foreign_code(values, overrides)
            return with_local_launcher(without_removed(values)) if primary.is_record else values
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = outer


@contextlib.contextmanager
def worded_errors(overrides: Sequence[str], primary: Primary = PROJECT) -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into a one-line ConfigurationError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises ValueError for model=null
        ours = next((one for one in causes(error) if isinstance(one, ConfigurationError)), None)
        if ours is error:
            raise
        chosen = functools.partial(compose_choices, overrides, primary)
        line = str(ours) if ours else reword_composition_error(error, overrides, primary.file, chosen)
        raise ConfigurationError(redacted(line)) from error
    except OSError as error:  # a directory of configurations without permission to list
        raise ConfigurationError(
            f"{error.filename}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    except RecursionError:
        raise ConfigurationError(
            f"{primary.file}: its defaults list includes the file itself; rename the file, or what it builds on"
        ) from None


def compose_choices(overrides: Sequence[str], primary: Primary) -> dict[str, Any]:
    """Compose only the choices among the overrides, without single keys. Empty if that fails as well."""
    choices = [override for override in overrides if key_of(override) in config_groups()]
    with contextlib.suppress(ConfigurationError):
        return compose_dictionary(choices, primary) if len(choices) < len(overrides) else {}
    return {}


def quoted(override: str) -> str:
    """Rewrite an override for Hydra: an element of a list as `key.0=`, a key to add with `++`, a value in quotes if needed.

    Quotes are needed if Hydra cannot parse the value and it has none of Hydra's syntax, as in `name=jörg`.
    """
    if override.startswith(("+=", "++=")):  # an assertion fails in Hydra
        raise ConfigurationError(not_an_override(override, [override]))
    if _ADDED.match(override):
        override = f"++{override}"
    override = _ELEMENT.sub(r"\1.\2=", override, count=1)
    key, equals, value = override.partition("=")
    if not equals or not value or _SYNTAX.search(value) or _PLAIN.fullmatch(override):
        return override
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return f"{key}='{value}'"
    return override


def hydra_overrides(primary: Primary, overrides: Sequence[str]) -> list[str]:
    """Rewrite all overrides for Hydra. A run from a record starts at step 0 and replaces nothing.

    Raises ConfigurationError if one belongs to another command, or sets `seed` for a record, which holds the seeds derived
    from its own.
    """
    for override in overrides:
        group = key_of(override).partition(".")[0]
        if group in OTHER_COMMANDS and "=" in override:
            raise ConfigurationError(f"{shown(override)}: {OTHER_COMMANDS[group]} {shown(override.lstrip('+'))}")
    overrides = [quoted(override) for override in overrides]
    if not primary.is_record:
        return overrides
    keys = [key_of(override) for override in overrides]
    if "seed" in keys and not {"seeds.model", "seeds.data", "seeds.curvature"} <= {*keys}:
        raise ConfigurationError(
            f"seed: {primary.file} holds the seeds derived from its own, so another seed= would change only the label; give "
            "seeds.model=, seeds.data= and seeds.curvature= too"
        )
    # A record lacks the settings that keep Hydra from writing files.
    quiet = [f"{key}={shown(value)}" for key, value in _settings_of_hydra("config.yaml")]
    quiet += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    return ["resume=auto", "overwrite=false", *quiet, *overrides]


def refuse_choices_by_name(overrides: Sequence[str], primary: Primary) -> None:
    """Refuse `optimizer.name=adamw` if another is chosen: the name would change, but the other one's keys would stay."""
    named = [override for override in overrides if override[:1] != "~" and choices_named(override)]
    if primary.is_record or not named:
        return
    chosen = flatten(compose_dictionary([override for override in overrides if override not in named], primary))
    for override in named:
        if chosen.get(key_of(override)) != unquoted(override.partition("=")[2]):
            choices = either(choices_named(override))
            raise ConfigurationError(
                f"{shown(override)}: changes the name but not the keys that belong to it; choose {choices}"
            )


def with_local_launcher(values: dict[str, Any]) -> dict[str, Any]:
    """Replace a record's launcher of other machines by ranks on this one: a record lacks Hydra's settings of a cluster."""
    launcher = values.get("launcher")
    if isinstance(launcher, Mapping) and (launcher.get("name") not in ("local", "joblib") or launcher.get("head")):
        values["launcher"] = {"name": "local", "nproc_per_node": launcher.get("nproc_per_node", 1)}
    return values


def resolved(config: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as a plain dictionary, with interpolations resolved and without Hydra's node."""
    ours = [str(key) for key in config if key not in ("hydra", "experiment", "study")]
    container = OmegaConf.to_container(OmegaConf.masked_copy(config, ours), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def check_hydra(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a composition in which Hydra would call or run anything that is neither its own nor from the command line.

    Hydra instantiates every `_target_` in its node, and logging instantiates classes and factories: launcher, sweeper,
    callbacks and handlers. `hydra.launcher` becomes a job script.
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
                f"{path}={named}: names code outside this project; remove it, and choose launchers with launcher="
            )
    launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(launcher, dict)
    for path, value in _leaves(launcher, "hydra.launcher"):
        if _has_control_character(f"{path}{value}"):
            raise ConfigurationError(
                f"{shown(path)}={shown(value)}: has a control character, such as a line break; leave it out"
            )
    setup = launcher.get("setup") or []
    commands = setup if isinstance(setup, list) else [setup]
    given = {of_element(key_of(override)) for override in overrides}
    of_files = [
        command
        for at, command in enumerate(commands)
        if command not in _own_setup() and not {f"{key}[{at}]" for key in SETUP_KEYS} & given
    ]
    if of_files and not SETUP_KEYS & given:
        raise ConfigurationError(
            f"launcher.setup={shown(of_files)}: a file may not set a job's shell commands; give launcher.setup=[...] on the "
            "command line"
        )


def refuse_foreign_code(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse a key that names code to run, such as `optimizer.factory`, unless one who may run code here has given it.

    These are the overrides (of the command line, or of a study file named there) and the project's own files. Any other
    file needs allow_code=true among the overrides.
    """
    for key in CODE_KEYS:
        group, _, leaf = key.partition(".")
        section = values.get(group)
        named = section.get(leaf) if isinstance(section, Mapping) else None
        if not isinstance(named, str) or named == "gpt2":  # the project's model, or what validation refuses
            continue
        if named == _given(key, overrides) or _given("allow_code", overrides) is True:
            continue
        if named not in _own_code():
            raise ConfigurationError(
                f"{key}={shown(named)}: names code to run, in a file from outside configs/; if you trust it, give "
                "allow_code=true on the command line"
            )


def _given(key: str, overrides: Sequence[str]) -> Any:
    """Return the value that the overrides give a key, None if they do not. Interpolations stay text."""
    own = [quoted(override) for override in overrides if key_of(override) == key]
    return OverridesParser.create().parse_override(own[-1]).value() if own else None


@functools.cache
def _own_code() -> frozenset[Any]:
    """Return the code that the project's files name."""
    leaves = (leaf for file in CONFIG_DIRECTORY.rglob("*.yaml") for leaf in _leaves(read_yaml(file), ""))
    names = {key.partition(".")[2] for key in CODE_KEYS}
    return frozenset(value for key, value in leaves if key.rpartition(".")[2] in names)


@functools.cache
def _own_setup() -> list[str]:
    """Return the shell commands of launcher=slurm."""
    return list(read_yaml(CONFIG_DIRECTORY / "launcher" / "slurm.yaml")["launcher"]["setup"])


def _has_control_character(text: str) -> bool:
    """Return whether the text has a control character (Cc), such as a line break, or a surrogate (Cs)."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def _leaves(values: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and plain values, with the members of lists."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _leaves(value, path)
    else:
        yield path, values


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recorded configuration without the keys that later versions lack.

    Raises ConfigurationError with the commit to use if one of them is switched on.
    """
    optimizer = values.get("optimizer")
    if not isinstance(optimizer, Mapping):
        return dict(values)
    for key, off in REMOVED.items():
        if optimizer.get(key, off) != off:
            raise ConfigurationError(
                f"optimizer.{key}={shown(optimizer[key])}: removed after this run was recorded (docs/decisions.md); check out "
                f"commit {LAST_WITH_REMOVED} to run or resume it"
            )
    return {**values, "optimizer": {key: value for key, value in optimizer.items() if key not in REMOVED}}


def validate_recorded(values: Mapping[str, Any]) -> RunConfig:
    """`validate` for the configuration that a record or a checkpoint holds, of this version or an earlier one."""
    return validate(without_removed(values))


def validate(values: Mapping[str, Any]) -> RunConfig:
    """Validate plain values and return the frozen configuration. ConfigurationError is one line about the first mistake."""
    try:
        config = RunConfig.model_validate(dict(values))
    except pydantic.ValidationError as error:
        raise ConfigurationError(redacted(reword_validation_error(error, values))) from error
    for key, value in _leaves(config.model_dump(mode="json"), ""):
        if not isinstance(value, str):
            continue
        if _has_control_character(value):
            raise ConfigurationError(f"{key}={value!r}: has a control character, such as a line break; leave it out")
        if name := secret_in(value):
            raise ConfigurationError(
                f"{key}: holds {name}, which would be written to {CONFIG_FILE}; set it in the environment of the run, or in "
                "~/.netrc"
            )
    return config
