"""A run's initial weights: the model's initialisation from a seed, or weights from a Hugging Face directory."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from models import GPT2, LanguageModel
from training.config import ConfigurationError, ModelConfig


class InitialWeights:
    """Full tensors by parameter name, the same on every rank and under every strategy.

    Args:
        config: the model's configuration; `init_from` names a directory of Hugging Face GPT-2 weights.
        model: the model, not sharded yet.
        seed: determines the weights if `init_from` is not set.

    Raises:
        ConfigurationError: the directory has no readable GPT-2, or one of another shape.
    """

    def __init__(self, config: ModelConfig, model: LanguageModel, seed: int) -> None:
        self._seed = seed
        self._initial_tensor = model.initial_tensor
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._loaded: dict[str, Tensor] | None = None
        if config.init_from is not None:
            from models.huggingface import from_huggingface

            assert isinstance(model, GPT2)
            try:
                given, self._loaded = from_huggingface(config.init_from)
            except ValueError as error:
                raise ConfigurationError(
                    f"model.init_from={config.init_from}: {error}; give a directory of GPT-2 weights"
                ) from error
            differing = {
                key: (value, getattr(model.config, key))
                for key, value in asdict(given).items()
                if value != getattr(model.config, key) and key != "dropout"
            }
            if differing:
                listed = ", ".join(f"{key} {there} there and {here} here" for key, (there, here) in differing.items())
                raise ConfigurationError(
                    f"model.init_from={config.init_from}: the weights have another shape ({listed}); choose their model="
                )

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full float32 tensor on the CPU) of each parameter, one at a time, in the model's order."""
        for name, shape in self._shapes.items():
            if self._loaded is None:
                yield name, self._initial_tensor(name, shape, self._seed)
            else:
                yield name, self._loaded[name].float()

    @torch.no_grad()
    def apply(self, model: LanguageModel) -> None:
        """Copy the weights into the model's parameters; a sharded parameter (DTensor) gets its shard."""
        parameters = dict(model.named_parameters())
        for name, full in self.tensors():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                shard = distribute_tensor(full.to(mesh.device_type), mesh, placements, src_data_rank=None)
                parameter.to_local().copy_(shard.to_local())
            else:
                parameter.copy_(full)

    def sha256(self) -> str:
        """Return the hash of names and bytes, in the order of the names."""
        hashes = {name: hashlib.sha256(full.contiguous().numpy().data).digest() for name, full in self.tensors()}
        digest = hashlib.sha256()
        for name, tensor_hash in sorted(hashes.items()):
            digest.update(name.encode())
            digest.update(tensor_hash)
        return digest.hexdigest()
