"""From command-line overrides to a validated RunConfig: Hydra's one place in the project.

Hydra's composition errors and pydantic's validation errors become one line each: the key, the value, the remedy.

Files outside of `configs` may come from others. They set the run's own keys; what Hydra does with a run (its `hydra` node,
and the shell commands of `launcher.setup`) is set by the project's files and the command line alone.
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

from training.config import ConfigurationError, RunConfig, flat, whole
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
from training.records import CONFIG_FILE, ENVIRONMENT_FILE
from training.secrets import redacted, secret_in

# Hydra's own, and those of its plugin packages (joblib, submitit): nothing else may be made of a configuration.
PLUGIN_SECTIONS = ("hydra.launcher", "hydra.sweeper")
PLUGIN_MODULES = ("hydra._internal.core_plugins.", "hydra_plugins.")
# The keys by which a command line sets the shell commands of a job.
SETUP_KEYS = {"launcher.setup", "hydra.launcher.setup"}
# What configs/config.yaml sets of Hydra's, for a record, which has nothing of the kind: it writes no files of its own.
QUIET = (
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=${output_dir}/.sweep",
    "hydra.sweep.subdir=.",
)
# What `${oc.env:NAME}` may read. The value is written to the record, so this has no credentials (SLURM_JWT is one).
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
# Hydra's syntax in a value: lists, quotes, sweeps, interpolations. A value without any of it may be put in quotes.
_SYNTAX = re.compile(r"""[\\'"()\[\]{}$,]""")
# An override that Hydra can read as it stands; asking its parser takes longer than all else here.
_PLAIN = re.compile(r"\+{0,2}[a-zA-Z]\w*(\.\w+)*=[\w./+-]+", re.ASCII)
# An element of a list as it is written here, in messages and in studies: optimizer.betas[0]=0.9.
_ELEMENT = re.compile(r"^(\+{0,2}[\w.]+)\[(\d+)\]=")


def readable_variable(name: str, *default: Any, _node_: Node) -> str | None:
    """OmegaConf's `oc.env` for `READABLE_VARIABLES`.

    Raises:
        ConfigurationError: another variable, set or not; or the variable is not set and there is no default.
    """
    key = _node_._get_full_key(None)
    if name not in READABLE_VARIABLES:
        raise ConfigurationError(
            f"{key}: reads the environment variable {shown(name)}, and a configuration is written to {CONFIG_FILE}; leave a "
            f"secret to the environment, and have the shell write anything else: {key}=$NAME"
        )
    if name not in os.environ and not default:
        raise ConfigurationError(
            f"{key}: the environment variable {name} is not set; set it, or give a default: ${{oc.env:{name},default}}"
        )
    value = os.environ.get(name, *default)
    return None if value is None else str(value)


# For the whole process: the trials of a sweep resolve their values in Hydra's hands, in workers and jobs too.
OmegaConf.register_new_resolver("oc.env", readable_variable, replace=True)
OmegaConf.register_new_resolver("whole", whole, replace=True)  # for the integers of Hydra's launchers
for _unused in ("oc.create", "oc.deprecated", "oc.dict.keys", "oc.dict.values"):  # none makes a plain value
    OmegaConf.clear_resolver(_unused)


class Primary(NamedTuple):
    """The file that a configuration begins with: `<directory>/<name>.yaml`.

    Groups are found in its directory, in `configs` and, after these, in `added`.
    """

    name: str = "config"
    directory: Path = CONFIG_DIRECTORY
    added: Path | None = None

    @property
    def file(self) -> Path:
        return self.directory / f"{self.name}.yaml"

    @property
    def is_record(self) -> bool:
        """Whether it is the configuration that a run has left: every value resolved, and no defaults list."""
        return self.file.name == CONFIG_FILE and os.path.isfile(self.directory / ENVIRONMENT_FILE)


PROJECT = Primary()


def compose(overrides: Sequence[str] = (), primary: Primary = PROJECT) -> RunConfig:
    """The validated configuration of `configs/config.yaml`, or another file, under Hydra overrides.

    Raises:
        ConfigurationError: one line that names the key, the value and the remedy.
    """
    return validate(compose_dictionary(overrides, primary))


# Both have the names of Hydra's own: in a worker Hydra registers those anew, and keeps what has the same name.
class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's source of YAML files, with this project's reading of them and its rule for those of others."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        if provider.startswith("hydra.searchpath") and not Path(self.path).is_dir():
            raise ConfigurationError(
                f"hydra.searchpath=[{shown(path)}]: there is no such directory; give one that has files"
            )

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path)).resolve()
        values = read_yaml(file)
        if values is None:
            values = {}
        if not isinstance(values, dict):
            said = f"the text {shown(values)!r}" if isinstance(values, str) else f"a {type(values).__name__}"
            raise ConfigurationError(
                f"{file}: holds {said}, where keys and values are expected; write lines of key: value, with a space after the "
                "colon"
            )
        defaults = values.get("defaults", [])
        if not isinstance(defaults, list) or not all(
            isinstance(item, str) or (isinstance(item, dict) and len(item) == 1) for item in defaults
        ):
            raise ConfigurationError(
                f"{file}: defaults: not a list of choices, one a line; write for example '- override /optimizer: lion'"
            )
        header = ConfigSource._get_header_dict(read_text(file)[:512])
        if not file.is_relative_to(CONFIG_DIRECTORY):
            refuse_reach_for_hydra(file, config_path, header.get("package"), values)
        try:
            config = OmegaConf.create(values)
        except OmegaConfBaseException as error:
            raise ConfigurationError(f"{file}: {omegaconf_problem(error)}") from error
        return ConfigResult(config=config, path=f"file://{self.path}", provider=self.provider, header=header)


class ImportlibResourcesConfigSource(importlib_resources_config_source.ImportlibResourcesConfigSource):
    """Hydra's source of configurations in Python packages, for Hydra's own: to look into one is to import it."""

    def __init__(self, provider: str, path: str) -> None:
        if provider.startswith("hydra.searchpath"):
            raise ConfigurationError(
                f"hydra.searchpath=[{shown(path)}]: would import a package; give a directory, file://..."
            )
        super().__init__(provider, path)


def refuse_reach_for_hydra(file: Path, config_path: str, package: str | None, values: Mapping[str, Any]) -> None:
    """Refuse a file of others that would set keys of Hydra's node: by content, place, package or what it builds on.

    It may choose one of the launchers that are installed, and repeat what the project's files say, as a copy of one does.

    Args:
        config_path: the file's place in its directory, `<group>/<choice>`.
        package: of its header: where in the configuration its content goes.

    Raises:
        ConfigurationError: naming the file and the key.
    """
    remedy = "which files outside of configs/ may not set; give it on the command line"
    reached = [(f"its place, {config_path}", config_path.rpartition("/")[0]), (f"# @package {package}", package or "")]
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
        if (key, value) not in _settings_of_hydra():
            raise ConfigurationError(f"{file}: {shown(key)}={shown(value)}: a key of hydra, {remedy}")


def refuse_reach_of_overrides(overrides: Iterable[str], origin: str = "a job") -> None:
    """Refuse overrides that a file holds (a study's) and that would set keys of Hydra's node.

    Raises:
        ConfigurationError: naming the first such override.
    """
    for override in overrides:
        if "hydra" in re.split(r"[./@:]", key_of(override)):
            raise ConfigurationError(
                f"{origin}: {shown(override)}: a key of hydra, which the command line alone may set"
            )


@functools.cache
def _settings_of_hydra() -> frozenset[tuple[str, Any]]:
    """What the project's own files set of Hydra's."""
    files = (CONFIG_DIRECTORY / "config.yaml", *(CONFIG_DIRECTORY / "launcher").glob("*.yaml"))
    return frozenset(leaf for file in files for leaf in _leaves(read_yaml(file).get("hydra", {}), "hydra"))


def begin_hydra(primary: Primary = PROJECT) -> Hydra:
    """A fresh Hydra that knows where configurations lie, as its global instance; `GlobalHydra.clear` ends it."""
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    Plugins.instance()  # registers Hydra's sources, which ours replace
    SourcesRegistry.instance().types |= {"file": FileConfigSource, "pkg": ImportlibResourcesConfigSource}
    path = create_config_search_path(str(primary.directory))
    if primary.directory != CONFIG_DIRECTORY:
        path.prepend("project", f"file://{CONFIG_DIRECTORY}", "schema")  # Hydra wants its schema to be the last
    if primary.added is not None:
        path.prepend("command-line", f"file://{primary.added}", "schema")
    return Hydra.create_main_hydra2("sophia", path)


def compose_dictionary(overrides: Sequence[str], primary: Primary = PROJECT) -> dict[str, Any]:
    """Hydra's composition as a plain, resolved dictionary, not yet validated.

    Raises:
        ConfigurationError: it cannot be composed, or it would have Hydra call what is none of its own plugins.
    """
    refuse_choices_by_name(overrides, primary)
    outer = GlobalHydra.instance().hydra  # inside a Hydra job (multirun) another Hydra is already initialised
    try:
        with worded_errors(overrides, primary):
            begin_hydra(primary)
            config = hydra_compose(
                primary.name, overrides=hydra_overrides(primary, overrides), return_hydra_config=True
            )
            check_hydra(config, overrides)
            values = resolved(config)
            return launched_here(values) if primary.is_record else values
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = outer


@contextlib.contextmanager
def worded_errors(overrides: Sequence[str], primary: Primary = PROJECT) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise of a configuration into a ConfigurationError of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra's, of model=null
        ours = next((one for one in causes(error) if isinstance(one, ConfigurationError)), None)
        if ours is error:
            raise
        chosen = functools.partial(chosen_alone, overrides, primary)
        line = str(ours) if ours else reword_composition_error(error, overrides, primary.file, chosen)
        raise ConfigurationError(redacted(line)) from error
    except OSError as error:  # a directory of configurations that may not be listed
        raise ConfigurationError(
            f"{error.filename}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    except RecursionError:
        raise ConfigurationError(
            f"{primary.file}: its defaults list leads back to itself; give the file another name than that on which it builds"
        ) from None


def chosen_alone(overrides: Sequence[str], primary: Primary) -> dict[str, Any]:
    """What the choices among the overrides compose, without single keys; nothing where these cannot be composed either."""
    choices = [override for override in overrides if key_of(override) in config_groups()]
    if len(choices) == len(overrides):
        return {}
    try:
        return compose_dictionary(choices, primary)
    except ConfigurationError:
        return {}


def quoted(override: str) -> str:
    """The override as Hydra reads it: an element of a list as `key.0=`, and a value in quotes where that is needed.

    It is where Hydra could not read the value and it has none of Hydra's syntax: `name=jörg`.

    Raises:
        ConfigurationError: it adds a value without a key.
    """
    if override.startswith(("+=", "++=")):  # of which Hydra asserts that there are none
        raise ConfigurationError(not_an_override(override, [override]))
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
    """The overrides as Hydra reads them. A record's run begins at step 0 and replaces nothing.

    Raises:
        ConfigurationError: an override of another command; or another seed for a record, which holds the
            seeds that follow from its own.
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
            f"seed: {primary.file} holds the seeds that followed from its own, so that another would change the label alone; "
            "give seeds.model=, seeds.data= and seeds.curvature= too"
        )
    return ["resume=auto", "overwrite=false", *QUIET, *overrides]


def refuse_choices_by_name(overrides: Sequence[str], primary: Primary) -> None:
    """Refuse `optimizer.name=adamw` where another is chosen: the name would change, and the keys of the chosen one stay.

    Raises:
        ConfigurationError: naming the choices that have the name.
    """
    named = [override for override in overrides if override[:1] != "~" and choices_named(override)]
    if primary.is_record or not named:
        return
    chosen = flat(compose_dictionary([override for override in overrides if override not in named], primary))
    for override in named:
        if chosen.get(key_of(override)) != unquoted(override.partition("=")[2]):
            choices = either(choices_named(override))
            raise ConfigurationError(
                f"{shown(override)}: the name without the keys that belong to it; choose the group: {choices}"
            )


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


def check_hydra(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a composition in which Hydra would call or run what is neither its own nor given on the command line.

    Hydra makes objects of what stands in its node under `_target_`, and logging of classes and factories: launcher,
    sweeper, callbacks and handlers. What stands in `hydra.launcher` becomes a job script.

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
    launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(launcher, dict)
    for path, value in _leaves(launcher, "hydra.launcher"):
        if _has_control_character(f"{path}{value}"):
            raise ConfigurationError(
                f"{shown(path)}={shown(value)}: has a control character, such as a line's end; leave it out"
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
            f"launcher.setup={shown(of_files)}: a file sets the shell commands of a job, which the command line alone may; "
            "give launcher.setup=[...] there"
        )


@functools.cache
def _own_setup() -> list[str]:
    """The shell commands of launcher=slurm."""
    return list(read_yaml(CONFIG_DIRECTORY / "launcher" / "slurm.yaml")["launcher"]["setup"])


def _has_control_character(text: str) -> bool:
    """Cc: control characters, ends of lines among them; Cs: half a character, which no file can hold."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


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
        raise ConfigurationError(redacted(reword_validation_error(error, values))) from error
    for key, value in _leaves(config.model_dump(mode="json"), ""):
        if not isinstance(value, str):
            continue
        if _has_control_character(value):
            raise ConfigurationError(f"{key}={value!r}: has a control character, such as a line's end; leave it out")
        if name := secret_in(value):
            raise ConfigurationError(
                f"{key}: holds {name} in the clear, and would be written to {CONFIG_FILE}; set it in the environment where the "
                "run starts, or in ~/.netrc"
            )
    return config
