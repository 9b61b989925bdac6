"""An optimizer of one's own: import `optimizer.factory`, call it with the run's parameter groups, check what it returns.

Whether the configuration may name a factory at all is decided when it is composed (training/compose.py).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from training import factories
from training.config import SQUARED_GRADIENTS, ConfigurationError, ExternalConfig

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# What the run gives the factory itself, and the key to set instead.
_GIVEN = {
    "lr": "optimizer.lr=",
    "weight_decay": "optimizer.weight_decay=",
    "params": "optimizer.groups=",
    "named_parameters": "optimizer.groups=",
}


def load(settings: ExternalConfig) -> Callable[..., Any]:
    """Import the factory, from an installed package or the current directory, and check it without calling it.

    Raises:
        ConfigurationError: there is no such module or name, importing it fails, it is not callable, it does not take the
            arguments, or it is a class of an optimizer that the loop cannot step. One line.
    """
    where = f"optimizer.factory={settings.factory}"
    found = factories.load("optimizer.factory", settings.factory)
    if isinstance(found, type):
        _refuse_class(found, where)
    _keywords(found, settings, where)
    return found


def build(settings: ExternalConfig, groups: list[dict[str, Any]], parameters: Mapping[str, Tensor]) -> Optimizer:
    """Call the factory and check the optimizer. Each of its groups has `lr`, `initial_lr` and `names` afterwards.

    Args:
        groups: by the project's rule, with names and rates.
        parameters: all parameters by name.

    Raises:
        ConfigurationError: as `load` does, or because the call fails, or it returns no optimizer that owns each parameter
            once. One line.
    """
    where = f"optimizer.factory={settings.factory}"
    factory = load(settings)
    keywords = _keywords(factory, settings, where)
    first, named = _parameters_of(factory)
    if named:
        keywords["named_parameters"] = list(parameters.items())
    given = [] if first == "named_parameters" else [groups]
    try:
        optimizer = factory(*given, **keywords)
    except Exception as error:
        raise ConfigurationError(
            f"{where}: calling it fails: {factories.said(error)}; correct it or optimizer.arguments"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"{where}: it returns a value of type {type(optimizer).__name__}; return a torch.optim.Optimizer"
        )
    _refuse_class(type(optimizer), where)
    if settings.weight_decay and "weight_decay" not in (factories.signature(factory) or {}) | optimizer.defaults:
        raise ConfigurationError(
            f"optimizer.weight_decay={settings.weight_decay:g}: {settings.factory} takes no weight_decay; give "
            "optimizer.weight_decay=0"
        )
    if settings.estimator is not None:
        _refuse_without_curvature(type(optimizer), settings, where)
    _name_groups(optimizer, parameters, settings, where)
    if has_evaluation_mode(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def has_evaluation_mode(optimizer: Optimizer) -> bool:
    """Return whether evaluations use other weights than training, as those of schedule-free optimizers do."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def _parameters_of(factory: Callable[..., Any]) -> tuple[str, bool]:
    """Return the name of the first parameter, which takes the groups, and whether there is `named_parameters`."""
    signature = factories.signature(factory) or {}
    first = next((name for name, one in signature.items() if one.kind in _POSITIONAL), "")
    return first, "named_parameters" in signature


def _keywords(factory: Callable[..., Any], settings: ExternalConfig, where: str) -> dict[str, Any]:
    """Return the factory's keyword arguments: those configured, and lr, weight_decay and k where its signature takes them."""
    first, _ = _parameters_of(factory)
    given: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.estimator is not None and "hessian_interval" in (factories.signature(factory) or {}):
        given["hessian_interval"] = settings.hessian_interval
    instead = {first: "optimizer.groups="} | _GIVEN
    return factories.keywords(factory, where, settings.arguments, given, instead)


def _refuse_class(kind: type, where: str) -> None:
    """Refuse classes whose step evaluates the loss itself: here, a step comes after the gradients."""
    step = factories.signature(getattr(kind, "step", None)) or {}
    needed = [name for name, one in step.items() if one.default is one.empty and one.kind not in factories.VARIADIC][1:]
    if needed or (hasattr(kind, "first_step") and hasattr(kind, "second_step")):
        how = f"its step needs {needed[0]}" if needed else "it has first_step and second_step"
        raise ConfigurationError(
            f"{where}: {how}, so it evaluates the loss several times per step, and the loop does so once; choose an "
            "optimizer whose step() takes the gradients as they are"
        )


def _refuse_without_curvature(kind: type, settings: ExternalConfig, where: str) -> None:
    needed = "num_predictions" if settings.estimator in SQUARED_GRADIENTS else "estimates"
    update = getattr(kind, "update_hessian", None)
    if update is None or needed not in (factories.signature(update) or {}):
        raise ConfigurationError(
            f"optimizer.estimator={settings.estimator}: {where.partition('=')[2]} has no update_hessian({needed}=...); add "
            "it, or give optimizer.estimator=null"
        )


def _name_groups(optimizer: Optimizer, parameters: Mapping[str, Tensor], settings: ExternalConfig, where: str) -> None:
    """Set names and initial rates. Raises ConfigurationError unless each parameter is in exactly one group."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    owned: list[str] = []
    for group in optimizer.param_groups:
        if any(id(parameter) not in name_of for parameter in group["params"]):
            raise ConfigurationError(
                f"{where}: a group has a tensor that is no parameter of the model; group those given"
            )
        if "lr" not in group:
            raise ConfigurationError(
                f"{where}: a group has no lr, which the schedule sets; read the rate from group['lr']"
            )
        if "initial_lr" not in group and (settings.embedding_lr_ratio != 1 or not settings.decay_embeddings):
            raise ConfigurationError(
                f"{where}: it forms groups of its own; give optimizer.embedding_lr_ratio=1 optimizer.decay_embeddings=true"
            )
        group["names"] = [name_of[id(parameter)] for parameter in group["params"]]
        group.setdefault("initial_lr", group["lr"])
        owned += group["names"]
    for number, problem in ((0, "is in no group"), (2, "is in several groups")):
        wrong = [name for name in parameters if min(owned.count(name), 2) == number]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ConfigurationError(f"{where}: {wrong[0]}{more} {problem}; put each parameter into one group")
