"""The specification of a study: one YAML file, validated before anything runs.

    name: small
    baseline: adamw
    base: [data=sample, tokenizer=bpe, train.global_batch_size=8]     # overrides that all trials share
    models:
      gpt2_nano: {horizons: [100, 200], tune_at: 100, seeds: [1, 2, 3]}
    tuning: {seeds: [100], method: coordinate, trials: 6, retune: {keys: [optimizer.lr], trials: 2}}
    arms:
      adamw:   {overrides: [optimizer=adamw],   search: {optimizer.lr: {values: [1.0e-3, 2.0e-3], widen: true}}}
      sophiag: {overrides: [optimizer=sophiag], search: {optimizer.lr: {values: [1.0e-3, 2.0e-3], widen: true}}}
    ablations:
      sophiag_k1: {of: sophiag, overrides: [optimizer.hessian_interval=1], model: gpt2_nano, horizons: [200]}

The number of reporting seeds and the tuning budget are fixed here and equal for all arms. Once reported runs are on
record, `study.py run` refuses a file with other seeds or without what was reported.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from training.compose import CONFIG_DIRECTORY
from training.config import ConfigurationError, NonNegativeInt, PositiveInt, whole
from training.config_files import read_yaml
from training.mistakes import choose_from, expectation, may_hold

STUDY_DIRECTORY = CONFIG_DIRECTORY / "study"

# Part of a trial's name, <arm>-<model>-<horizon>-<hash>-s<seed>, which file systems limit to 255 bytes.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]*$", max_length=64)]
# A configuration key, or one element of a list: optimizer.betas[0].
Key = Annotated[str, Field(pattern=r"^[a-z_]+(\.[a-z_0-9]+)+(\[\d+\])?$")]
Value = bool | int | float | str

_DIGITS = 4  # significant digits of generated values


def rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{repeated} {'is' if len(repeated) == 1 else 'are'} given more than once; give each once")
    return values


Horizons = Annotated[tuple[PositiveInt, ...], AfterValidator(_distinct)]
Seeds = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1), AfterValidator(_distinct)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Choices(Section):
    """Values in order. The search starts at `start`, by default the middle one.

    `widen` lets a coordinate search continue beyond an end, by the ratio of the last two values.
    """

    values: Annotated[tuple[Value, ...], Field(min_length=1)]
    start: Value | None = None
    widen: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.start is not None and self.start not in self.values:
            raise ValueError(f"start={self.start} is not among the values {list(self.values)}; choose one of them")
        if self.widen and not all(_is_positive(value) for value in self.values):
            raise ValueError(
                f"widen=true needs positive numbers, but the values are {list(self.values)}; choose widen=false"
            )
        if self.widen and len(self.values) < 2:
            raise ValueError("widen=true needs at least two values, for their ratio; add one")
        return self

    @property
    def first(self) -> Value:
        return self.start if self.start is not None else self.values[len(self.values) // 2]

    @property
    def ladder(self) -> "Choices":
        return self

    def neighbours(self) -> int:
        """Return the number of neighbours of `first`."""
        index = self.values.index(self.first)
        return 2 if self.widen else (index > 0) + (index < len(self.values) - 1)


class Range(Section):
    """Numbers between `low` and `high`, for random and Halton search. Its first trial is `start`, by default the middle.

    A re-tuning moves by quarters of the range, and beyond the ends of a logarithmic one. The range of a key that holds
    integers alone is `whole`; an external optimizer's own integers have to be declared so.
    """

    low: float
    high: float
    scale: Literal["log", "linear"] = "log"
    start: float | None = None
    whole: bool = False  # integers only

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}; swap them")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low={self.low}: scale=log needs a positive number; choose scale=linear")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f"start={self.start} is not between low={self.low} and high={self.high}")
        return self

    @property
    def first(self) -> float:
        return self.at(0.5) if self.start is None else self._given(self.start)

    @property
    def ladder(self) -> Choices:
        steps = dict.fromkeys(self.at(share) for share in (0, 0.25, 0.5, 0.75, 1))
        return Choices(values=tuple(steps), widen=self.scale == "log")

    def at(self, share: float) -> float:
        """Return the number at a share of the way from low to high."""
        if self.scale == "log":
            return self._given(self.low * (self.high / self.low) ** share)
        return self._given(self.low + share * (self.high - self.low))

    def _given(self, value: float) -> float:
        return round(value) if self.whole else rounded(value)


def _kind_of_space(value: Any) -> str:
    given = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return "range" if "low" in given or "high" in given else "values"


Space = Annotated[Annotated[Choices, Tag("values")] | Annotated[Range, Tag("range")], Discriminator(_kind_of_space)]


def _whole_numbers(values: Any) -> Any:
    """Convert 1e3 to 1000 in values of integer keys, and draw integers from their ranges."""

    def meant(value: Any) -> Any:
        if isinstance(value, Mapping):
            return ({"whole": True} if "low" in value else {}) | {name: meant(one) for name, one in value.items()}
        return [meant(one) for one in value] if isinstance(value, list) else whole(value)

    if not isinstance(values, Mapping):
        return values
    of_integers = {key for key in values if may_hold(int, str(key)) and not may_hold(float, str(key))}
    return {key: meant(value) if key in of_integers else value for key, value in values.items()}


class ArmSpec(Section):
    """One arm: its overrides, and its search spaces by configuration key.

    `horizons` restricts an arm to some of its models' horizons, and `seeds` to the first of their reporting seeds, to
    save cost.
    """

    overrides: tuple[str, ...]
    search: Annotated[dict[Key, Space], BeforeValidator(_whole_numbers)] = {}
    horizons: Horizons = ()
    seeds: PositiveInt | None = None  # number of each model's reporting seeds; default: all


class AblationSpec(Section):
    """An arm's reported runs with one change. All other hyper-parameters are the arm's; nothing is searched.

    `values` replace values that the arm's search found, also list elements.
    """

    of: Name
    overrides: tuple[str, ...] = ()
    values: Annotated[dict[Key, Value], BeforeValidator(_whole_numbers)] = {}
    model: Name
    horizons: Annotated[Horizons, Field(min_length=1)]
    seeds: PositiveInt | None = None  # number of the model's reporting seeds to use; default: all

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.overrides and not self.values:
            raise ValueError(f"of={self.of}: neither overrides nor values; add what the ablation changes")
        return self


class ModelSpec(Section):
    """A model's horizons in steps: the baseline runs at all of them, the other arms at `arm_horizons`.

    The full search runs at `tune_at`. With `like`, it is a re-tuning that starts from another model's result.
    """

    horizons: Annotated[Horizons, Field(min_length=1)]
    arm_horizons: Horizons = ()
    tune_at: PositiveInt
    seeds: Seeds
    like: Name | None = None
    arms: tuple[Name, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def challenged_at(self) -> tuple[int, ...]:
        """The reported horizons of the arms other than the baseline."""
        return self.arm_horizons or self.horizons

    @model_validator(mode="after")
    def _horizons_known(self) -> Self:
        known = set(self.horizons)
        for name, values in (("arm_horizons", self.arm_horizons), ("tune_at", (self.tune_at,))):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise ValueError(f"{name}={unknown} is not among horizons={list(self.horizons)}; add it there")
        return self


class RetuneSpec(Section):
    """The search at every other horizon and on a model with `like`: only these keys, from the best point so far.

    It is a coordinate search, whatever the method of the full search.
    """

    keys: tuple[Key, ...]
    trials: PositiveInt


class FinalistsSpec(Section):
    """The best `settings` of each search run again on further tuning seeds, whose mean loss decides between them."""

    settings: Annotated[int, Field(ge=2)]
    seeds: Seeds
    retune: bool = True  # those of a re-tuning as well; false: only those of the full search


class TuningSpec(Section):
    """The search and its budget, the same for every arm."""

    seeds: Seeds
    method: Literal["coordinate", "grid", "random", "halton"]
    trials: PositiveInt  # runs of each arm at `tune_at`, without finalists
    threshold: Annotated[float, Field(ge=0)] = 0.0  # nats, minimum improvement for a move of the coordinate search
    # When a coordinate search follows a move further: after every key was tried once, or before the next key.
    follow: Literal["after_round", "at_once"] = "after_round"
    retune: RetuneSpec | None = None
    finalists: FinalistsSpec | None = None

    @property
    def all_seeds(self) -> set[int]:
        return {*self.seeds, *(self.finalists.seeds if self.finalists else ())}

    @model_validator(mode="after")
    def _seeds_fit(self) -> Self:
        seeds = len(self.seeds)
        for key, trials in (("trials", self.trials), ("retune.trials", self.retune.trials if self.retune else 0)):
            if trials % seeds:
                raise ValueError(
                    f"{key}={trials} is not a multiple of the {seeds} tuning seeds; each setting runs with all of them"
                )
        if self.finalists and (overlap := sorted({*self.seeds} & {*self.finalists.seeds})):
            raise ValueError(f"finalists.seeds: {overlap} are also in seeds; choose seeds that the search does not use")
        return self


class StudySpec(Section):
    """A whole study."""

    name: Name
    description: str = ""
    builds_on: tuple[Name, ...] = ()  # studies whose results chose settings of this one
    baseline: Name
    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    base: tuple[str, ...] = ()
    models: Annotated[dict[Name, ModelSpec], Field(min_length=1)]
    tuning: TuningSpec
    arms: Annotated[dict[Name, ArmSpec], Field(min_length=1)]
    ablations: dict[Name, AblationSpec] = {}

    @model_validator(mode="after")
    def _names_known(self) -> Self:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline={self.baseline}: no such arm; choose one of {', '.join(self.arms)}")
        seen: list[str] = []
        for name, model in self.models.items():
            if model.like is not None and model.like not in seen:
                raise ValueError(f"models.{name}.like={model.like}: expected a model listed before it ({seen})")
            source = name if model.like is None else model.like
            if lacking := [arm for arm in self.arms_on(name) if arm not in self.arms_on(source)]:
                raise ValueError(
                    f"models.{name}.like={source}: {source} has no search of {', '.join(lacking)} to start from; add it to "
                    f"models.{source}.arms, or set models.{name}.arms without it"
                )
            unknown = [arm for arm in model.arms if arm not in self.arms]
            if unknown or (model.arms and self.baseline not in model.arms):
                raise ValueError(
                    f"models.{name}.arms={list(model.arms)}: expected arms of the study, including the baseline; "
                    f"choose from {', '.join(self.arms)}"
                )
            overlap = sorted({*model.seeds} & self.tuning.all_seeds)
            if overlap:
                raise ValueError(
                    f"models.{name}.seeds: {overlap} are also tuning seeds; report on seeds that the search does not use"
                )
            seen.append(name)
        return self

    @model_validator(mode="after")
    def _arms_reported(self) -> Self:
        for name, arm in self.arms.items():
            where = f"arms.{name}.horizons={list(arm.horizons)}"
            if arm.horizons and name == self.baseline:
                raise ValueError(f"{where}: the baseline must run at all horizons; remove this key")
            if arm.seeds and name == self.baseline:
                raise ValueError(
                    f"arms.{name}.seeds={arm.seeds}: the baseline must run with all seeds; remove this key"
                )
            on = [model for model in self.models if name in self.arms_on(model)]
            choices = sorted({horizon for model in on for horizon in self.models[model].challenged_at})
            unknown = [horizon for horizon in arm.horizons if horizon not in choices]
            if unknown:
                raise ValueError(f"{where}: no model of {name} has horizon {unknown}; choose from {choices}")
            for model in on:
                if not self.horizons(name, model):
                    raise ValueError(
                        f"{where}: {model} has none of them; choose from its horizons, or remove {name} from its arms"
                    )
        return self

    @model_validator(mode="after")
    def _searches_fit(self) -> Self:
        method, seeds = self.tuning.method, len(self.tuning.seeds)
        for name, arm in self.arms.items():
            for key, space in arm.search.items():
                needed = Range if method in ("random", "halton") else Choices
                if not isinstance(space, needed):
                    raise ValueError(
                        f"arms.{name}.search.{key}: tuning.method={method} needs "
                        + ("low and high" if needed is Range else "values")
                    )
            if method == "grid" and arm.search:
                size = math.prod(len(s.values) for s in arm.search.values() if isinstance(s, Choices)) * seeds
                if size > self.tuning.trials:
                    raise ValueError(
                        f"arms.{name}.search has {size} trials, more than tuning.trials={self.tuning.trials}; "
                        "remove values or raise tuning.trials"
                    )
            if self.tuning.follow == "after_round":
                self._rounds_fit(name)
        return self

    def _rounds_fit(self, name: str) -> None:
        """Refuse a coordinate search whose budget ends before every key was tried."""
        search, tuning = self.arms[name].search, self.tuning
        budgets = []
        if tuning.method == "coordinate" and search:
            budgets.append(("tuning.trials", tuning.trials, [space.ladder.neighbours() for space in search.values()]))
        if tuning.retune and (keys := [key for key in tuning.retune.keys if key in search]):
            ladders = [search[key].ladder for key in keys]
            most = [2 if ladder.widen else min(2, len(ladder.values) - 1) for ladder in ladders]
            budgets.append(("tuning.retune.trials", tuning.retune.trials, most))
        for key, trials, neighbours in budgets:
            needed = (1 + sum(neighbours)) * len(tuning.seeds)
            if trials < needed:
                raise ValueError(
                    f"{key}={trials} is less than the {needed} trials of one round of {name}: the start and "
                    f"{sum(neighbours)} neighbours of {len(neighbours)} keys, on {len(tuning.seeds)} seeds; raise it, "
                    "search fewer keys, or set tuning.follow=at_once"
                )

    @model_validator(mode="after")
    def _ablations_known(self) -> Self:
        for name, ablation in self.ablations.items():
            where = f"ablations.{name}"
            if name in self.arms:
                raise ValueError(f"{where}: an arm has this name; choose another")
            if ablation.of not in self.arms:
                raise ValueError(f"{where}.of={ablation.of}: no such arm; choose one of {', '.join(self.arms)}")
            if ablation.model not in self.models:
                raise ValueError(
                    f"{where}.model={ablation.model}: no such model; choose one of {', '.join(self.models)}"
                )
            reported = self.horizons(ablation.of, ablation.model)
            missing = [horizon for horizon in ablation.horizons if horizon not in reported]
            if missing:
                raise ValueError(
                    f"{where}.horizons: {ablation.of} has no runs of {missing} steps on {ablation.model}; choose from "
                    f"{list(reported)}"
                )
        return self

    def arms_on(self, model: str) -> list[str]:
        """Return the arms that run on a model, the baseline first."""
        names = self.models[model].arms or tuple(self.arms)
        return sorted(names, key=lambda arm: arm != self.baseline)

    def seeds(self, arm: str, model: str) -> tuple[int, ...]:
        """Return the reporting seeds of an arm on a model."""
        return self.models[model].seeds[: self.arms[arm].seeds]

    def horizons(self, arm: str, model: str) -> tuple[int, ...]:
        """Return the reported horizons of an arm on a model, ascending."""
        if arm not in self.arms_on(model):
            return ()
        spec = self.models[model]
        chosen = spec.horizons if arm == self.baseline else spec.challenged_at
        kept = self.arms[arm].horizons
        return tuple(sorted(horizon for horizon in chosen if not kept or horizon in kept))


def load_spec(study: str | Path, directory: Path = STUDY_DIRECTORY) -> StudySpec:
    """Load a study by its name in configs/study or by path.

    Raises:
        ConfigurationError: one line that names the key, the value and the remedy.
    """
    path = Path(study) if str(study).endswith((".yaml", ".yml")) else directory / f"{study}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in directory.glob("*.yaml"))
        raise ConfigurationError(
            f"study={study}: {path} does not exist; {choose_from(path.stem, known, 'study')}, or give a file"
        )
    from analysis.trials import PLAN  # pyarrow comes with it, which an unknown study need not wait for

    values = read_yaml(path)
    if isinstance(values, Mapping):  # the study.yaml of a record also has a `plan`
        values = {key: value for key, value in values.items() if key != PLAN}
    return validate_spec(values, str(path))


def validate_spec(values: Any, origin: str) -> StudySpec:
    """Validate plain values as a study; `origin` is the source named in errors."""
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{origin}: expected a mapping with name, baseline, models, tuning and arms")
    try:
        return StudySpec.model_validate(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("values", "range"))
        match first["type"]:
            case "value_error":
                text = first["msg"].removeprefix("Value error, ")
            case "extra_forbidden":
                text = "unknown key; correct its name or remove it"
            case "missing":
                text = "missing; give it a value"
            case _:
                text = expectation([first], where, None)
        given = "" if isinstance(first["input"], (Mapping, BaseModel)) else f"={first['input']}"
        raise ConfigurationError(f"{origin}: {where + given + ': ' if where else ''}{text}") from error


def points(search: Mapping[str, Space]) -> list[dict[str, Value]]:
    """Return every combination of a search's choices, the last key varying fastest."""
    spaces = [space.values for space in search.values() if isinstance(space, Choices)]
    return [dict(zip(search, combination, strict=True)) for combination in itertools.product(*spaces)]


def _is_positive(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
