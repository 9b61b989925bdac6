"""The run's model: GPT-2, or one of your own, `model.architecture=<module>:<callable>` (docs/model.md)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models import GPT2, GPT2Config, LanguageModel
from models.flops import Flops
from training import factories
from training.config import ConfigurationError, ModelConfig
from training.mistakes import shown

# Keys of a model that its architecture gets where it takes them; those of the second kind can be left at their defaults.
_SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
_OPTIONAL = {key: ModelConfig.model_fields[key].default for key in ("bias", "dropout", "attention_layer_scaling")}


def model_shape(config: ModelConfig, vocab_size: int) -> GPT2Config:
    """Return the configured shape of a GPT-2 with the tokenizer's vocabulary."""
    assert config.is_gpt2, config.architecture
    return GPT2Config(vocab_size, **{key: getattr(config, key) for key in (*_SHAPE, *_OPTIONAL)})


def build_model(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """Build the configured model on the meta device.

    Raises:
        ConfigurationError: the architecture cannot be imported or called, or its model lacks something that training needs.
            One line.
    """
    if config.is_gpt2:
        with torch.device("meta"):
            return GPT2(model_shape(config, vocab_size))
    where = f"model.architecture={config.architecture}"
    architecture = load(config)
    keywords = _keywords(architecture, config, vocab_size)
    try:
        with torch.device("meta"):
            model = architecture(**keywords)
    except Exception as error:
        raise ConfigurationError(
            f"{where}: calling it fails: {factories.said(error)}; correct it or model.arguments"
        ) from error
    if problem := _problem(model, vocab_size):
        raise ConfigurationError(f"{where}: {problem}")
    return model  # type: ignore[no-any-return]


def load(config: ModelConfig) -> Callable[..., Any]:
    """Import the architecture and check its arguments without calling it.

    Raises:
        ConfigurationError: it cannot be imported, does not take the arguments, or ignores a key that is set. One line.
    """
    architecture = factories.load("model.architecture", config.architecture)
    keywords = _keywords(architecture, config, vocab_size=1)
    for key, default in _OPTIONAL.items():
        value = getattr(config, key)
        if key not in keywords and value != default:
            raise ConfigurationError(
                f"model.{key}={shown(value)}: {config.architecture} takes no {key}; give model.{key}={shown(default)}"
            )
    return architecture


def _keywords(architecture: Callable[..., Any], config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    named = factories.signature(architecture) or {}
    optional = [key for key, default in _OPTIONAL.items() if key in named or getattr(config, key) != default]
    given = {"vocab_size": vocab_size} | {key: getattr(config, key) for key in (*_SHAPE, *optional)}
    instead = {"vocab_size": "tokenizer="} | {key: f"model.{key}=" for key in (*_SHAPE, *_OPTIONAL)}
    where = f"model.architecture={config.architecture}"
    return factories.keywords(architecture, where, config.arguments, given, instead)


def _problem(model: Any, vocab_size: int) -> str | None:
    """Return what training needs of a model on the meta device and this one lacks, with the remedy; None if nothing."""
    if not isinstance(model, LanguageModel):
        return f"it returns a value of type {type(model).__name__}; return a models.LanguageModel"
    if model.vocab_size != vocab_size:
        return (
            f"its model has vocab_size={model.vocab_size}; hand the given one, {vocab_size}, to LanguageModel.__init__"
        )
    if not isinstance(getattr(model, "blocks", None), nn.ModuleList) or not len(model.blocks):
        return "its model has no blocks; keep its layers in a torch.nn.ModuleList of that name"
    try:
        output = model.output_weight
    except AttributeError as error:
        return f"its model has no output layer ({error}); name one token_embedding, or override output_weight"
    if output.dim() != 2 or output.size(0) < vocab_size:
        return f"output_weight has the shape {tuple(output.shape)}; give it at least {vocab_size} rows"
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names[id(parameter)] != name:
            return f"{name} and {names[id(parameter)]} are one tensor; keep one of them, and use it in both places"
    if buffer := next((name for name, _ in model.named_buffers()), None):
        return f"the value of its buffer {buffer} is lost on the meta device; compute it in the forward pass"
    for name in names.values():
        try:
            kind = model.parameter_kind(name)
        except ValueError as error:
            return f"{error}; or override parameter_kind"
        if kind not in model.kinds:
            return f"parameter_kind({name!r}) returns {kind!r}; return one of kinds, {', '.join(model.kinds)}"
    return None


def forward_flops(config: ModelConfig, model: LanguageModel, sequence_length: int) -> Flops:
    """Return the forward FLOPs per token of a model on the meta device.

    Raises:
        ConfigurationError: `hidden` of an architecture of your own, in which they are counted, fails. One line.
    """
    try:
        return model.flops(sequence_length)
    except Exception as error:
        if config.is_gpt2:
            raise
        raise ConfigurationError(
            f"model.architecture={config.architecture}: hidden(tokens) fails: {factories.said(error)}; correct it, or override "
            "flops if it cannot run on the meta device"
        ) from error
