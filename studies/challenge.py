"""A challenger: one optimizer of your own against the recorded arms of a study, under the study's own protocol.

    python scripts/study.py run study=challenge challenger.factory=my_optimizer:Mine challenger.search=my_space.yaml

The study <study>_<name> has the arms of <study> and the challenger. Trials are identified by their overrides, so the tables of
<study> hold all trials of its arms, and only the challenger's run. Trials, seeds and horizons are the study's; the challenger
brings its ranges and what it fixes of its own keys.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.guards import inspect
from analysis.trial_tables import CURVES_FILE, TRIALS_FILE, read_trials
from analysis.trials import is_study, load_study
from data.files import write_atomically
from studies.expansion import ELEMENT, expand
from studies.spec import StudySpec, validate_spec
from studies.store import Places, compact, outcomes
from studies.verify import verified, verify
from training.compose import compose
from training.config import ConfigurationError, ExternalConfig
from training.config_files import read_yaml
from training.mistakes import choose_from

ROOT = Path(__file__).resolve().parent.parent
_PREFIX = "challenger."
_DECAY = "optimizer.weight_decay"
_FIXED = ("arguments", "groups", "estimator", "hessian_interval", "batch_fraction")  # keys of `optimizer.` as well


@dataclass(frozen=True)
class Challenger:
    """What the command line says of the challenger."""

    factory: str  # <module>:<callable>
    search: str  # a YAML file with a range for each key: {low, high}, optionally scale and start
    name: str = ""  # default: the callable's name in lower case
    fixed: Mapping[str, str] = field(default_factory=dict)  # values in Hydra's syntax by key of `optimizer.`

    @property
    def arm(self) -> str:
        return self.name or self.factory.rpartition(":")[2].rpartition(".")[2].lower()


def challenger_of(overrides: Sequence[str]) -> Challenger:
    """Return the challenger that overrides `challenger.<key>=<value>` describe.

    Raises:
        ConfigurationError: an unknown key, or a missing one.
    """
    known = ["factory", "search", "name", *_FIXED]
    values: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.removeprefix(_PREFIX).partition("=")
        if key not in known:
            raise ConfigurationError(f"{override}: no such key; {choose_from(key, known, 'challenger')}")
        values[key] = value
    for key, example in (("factory", "my_optimizer:Mine"), ("search", "my_space.yaml")):
        if not values.get(key):
            raise ConfigurationError(f"{_PREFIX}{key}: missing; give one, such as {_PREFIX}{key}={example}")
    fixed = {key: values.pop(key) for key in _FIXED if key in values}
    return Challenger(**values, fixed=fixed)


def with_challenger(spec: StudySpec, challenger: Challenger) -> StudySpec:
    """Return the study with the challenger as one more arm.

    Raises:
        ConfigurationError: the search file has a key that is not the optimizer's, lacks one that all arms search, or is not
            valid; the factory cannot be imported or does not build an optimizer. One line.
    """
    arm = challenger.arm
    if arm in spec.arms or arm in spec.ablations:
        raise ConfigurationError(f"{_PREFIX}name={arm}: {spec.name} has an arm of this name; give another")
    if not Path(challenger.search).is_file():
        raise ConfigurationError(
            f"{_PREFIX}search={challenger.search}: no such file; give one with a range for each key"
        )
    search = read_yaml(Path(challenger.search))
    if not isinstance(search, Mapping):
        raise ConfigurationError(f"{challenger.search}: expected a range for each key, such as {_example(spec)}")
    _refuse_keys(spec, [str(key) for key in search], challenger.search)
    overrides = ["optimizer=external", f"optimizer.factory={challenger.factory}"]
    for key, value in challenger.fixed.items():
        if f"optimizer.{key}" in search:
            raise ConfigurationError(
                f"{_PREFIX}{key}={value}: {challenger.search} searches optimizer.{key}; keep one of the two"
            )
        overrides.append(f"optimizer.{key}={value}")
    overrides += [] if _DECAY in search else [f"{_DECAY}=0"]
    values: dict[str, Any] = spec.model_dump(mode="json", exclude_defaults=True)
    values["name"] = f"{spec.name}_{arm}"
    values["description"] = f"{challenger.factory} against the recorded arms of {spec.name}. {spec.description}"
    values["arms"][arm] = {"overrides": overrides, "search": dict(search)}
    challenged = validate_spec(values, challenger.search)
    _build(challenged, arm)
    return challenged


def prepare(
    baselines: StudySpec, spec: StudySpec, places: Places, records: Path, log: Callable[[str], None] = print
) -> None:
    """Give the challenge the records of the study's own arms, and check that this machine reproduces one of them.

    Args:
        baselines: the study as it is in its file.
        spec: the result of `with_challenger`.
        places: of `spec`.
        records: parent directory of the records, where those of `baselines` are looked for before this repository's.

    Raises:
        ConfigurationError: the records are incomplete, or do not fit the study's file.
    """
    source = next((one for one in (records / baselines.name, ROOT / "results" / baselines.name) if is_study(one)), None)
    first = f"run `python scripts/study.py run study={baselines.name}` first"
    if source is None:
        raise ConfigurationError(f"{records / baselines.name}: no records of {baselines.name} to compare with; {first}")
    recorded = outcomes(Places(Path(source, "no runs"), source))
    missing = expand(baselines, recorded).missing(recorded)
    if missing:
        raise ConfigurationError(f"{source}: {missing[0].name} and {len(missing) - 1} more are not on record; {first}")
    if not is_study(places.records):
        places.records.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / CURVES_FILE, places.records / CURVES_FILE)
        write_atomically(places.records / TRIALS_FILE, (source / TRIALS_FILE).read_bytes())
    known = outcomes(places)
    if stale := [one for one in expand(spec, known).missing(known) if one.arm in baselines.arms]:
        raise ConfigurationError(
            f"{places.records}: {stale[0].name} is not on record, as it is in {source}; remove {places.records}"
        )
    compact(spec, places)
    own = {row.trial for row in read_trials(places.records) if row.arm == spec.baseline}
    if own.isdisjoint(line["trial"] for line in verified(places.records)):
        _reproduce(spec, places, log)


def _refuse_keys(spec: StudySpec, given: Sequence[str], where: str) -> None:
    shared = set.intersection(*({*arm.search} for arm in spec.arms.values() if arm.search))
    for key in given:
        section, _, rest = key.partition(".")
        own = section == "optimizer" and rest.partition(".")[0] not in ("name", "factory")
        if not own and key not in shared:
            raise ConfigurationError(f"{where}: {key}: it is part of the protocol, not of the optimizer; remove it")
    for key in sorted(shared - {*given, _DECAY}):
        section, _, rest = key.partition(".")
        element = ELEMENT.match(rest)
        if section != "optimizer" or (element["key"] if element else rest) in ExternalConfig.model_fields:
            raise ConfigurationError(f"{where}: {key}: missing; every arm searches it, so give it low and high")


def _example(spec: StudySpec) -> str:
    key, space = next(iter(spec.arms[spec.baseline].search.items()))
    return f"{key}: {space.model_dump(exclude_defaults=True)}"


def _build(spec: StudySpec, arm: str) -> None:
    """Build the challenger's optimizer on a tiny model, before hours depend on it."""
    from training.optimizer_check import Fed  # torch comes with it

    trial = next(one for one in expand(spec, {}).trials if one.arm == arm)
    Fed(compose(trial.overrides))


def _reproduce(spec: StudySpec, places: Places, log: Callable[[str], None]) -> None:
    """Rerun the baseline's shortest reported run. The report warns if it is far from its record; so does this."""
    trials = [one for one in load_study([places.records]).reporting if one.arm == spec.baseline and one.run]
    shortest = min(trials, key=lambda one: (one.status != "completed", one.horizon, one.seed))
    log(f"checking that this machine reproduces {shortest.origin.name}")
    (found,) = verify([shortest], places.work / "verify", places.records, log=lambda _: None)
    doubts = [one.title for one in inspect(load_study([places.records])) if one.guard == "machine"]
    log(doubts[0] if doubts else f"it does: the final loss is {found.final_difference:.2g} nats from its record")
