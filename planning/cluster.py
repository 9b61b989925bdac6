"""The planner's input: the cluster (a GPU kind from configs/cluster, number, utilisation) and the run's configuration on it.

Only the planner has `cluster.` keys; they are not part of a run's configuration or name. This module does not import
torch, so that mistakes are refused before the planner, which does, is imported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import Field

from training.compose import CONFIG_DIRECTORY, compose_dictionary, validate
from training.config import (
    ConfigurationError,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RunConfig,
    Section,
    divisors,
)
from training.config_files import parse_value
from training.mistakes import choose_from, either, expectation, key_of, likely, shown

GPU_DIRECTORY = CONFIG_DIRECTORY / "cluster"
PREFIX = "cluster."
DEFAULT_GPU = "h100"
#: Optimizers to plan by default.
OPTIMIZERS = ("adamw", "lion", "sophiag", "sophiah", "muon")


class ClusterConfig(Section):
    """Bandwidths in GB/s (10⁹ bytes), one direction, by GPU; peaks in 10¹² FLOP/s."""

    gpu: str
    gpus: PositiveInt = 1
    memory_gib: PositiveFloat
    bf16_tflops: PositiveFloat
    fp32_tflops: PositiveFloat
    memory_bandwidth: PositiveFloat
    gpus_per_node: PositiveInt
    node_bandwidth: PositiveFloat
    network_bandwidth: PositiveFloat
    price_per_hour: NonNegativeFloat
    #: Share of the peak that forward and backward passes reach, in model FLOPs without recomputation.
    utilisation: Fraction = 0.4
    #: Share of the memory and link bandwidths that a GPU reaches.
    bandwidth_utilisation: Fraction = 0.8
    #: Memory not available for tensors: CUDA context, NCCL channels, fragmentation.
    reserved_gib: Annotated[float, Field(ge=0)] = 3.0

    @property
    def usable_bytes(self) -> int:
        """A GPU's memory available for tensors."""
        return round((self.memory_gib - self.reserved_gib) * 2**30)

    @property
    def link_bandwidth(self) -> float:
        """Bytes per second that each GPU sends in a ring over all GPUs; between nodes, rings use all of a node's adapters."""
        slowest = self.node_bandwidth
        if self.gpus > self.gpus_per_node:
            slowest = min(slowest, self.gpus_per_node * self.network_bandwidth)
        return slowest * 1e9 * self.bandwidth_utilisation


def gpu_kinds() -> list[str]:
    return sorted(path.stem for path in GPU_DIRECTORY.glob("*.yaml"))


def split_cluster(overrides: Sequence[str]) -> tuple[ClusterConfig, list[str]]:
    """Split into the cluster of the `cluster.` overrides and the other overrides.

    Raises:
        ConfigurationError: an unknown GPU kind or key, or a value out of range.
    """
    given: dict[str, Any] = {}
    others = []
    for override in overrides:
        key, equals, value = override.lstrip("+").partition("=")
        if key in ClusterConfig.model_fields or key == "cluster":
            raise ConfigurationError(f"{override}: did you mean {PREFIX}{'gpu' if key == 'cluster' else key}={value}?")
        if not key.startswith(PREFIX):
            others.append(override)
        elif not equals:
            raise ConfigurationError(f"{override}: not an override; write {override}=<value>")
        else:
            given[key.removeprefix(PREFIX)] = parse_value(override)
    kind = str(given.pop("gpu", DEFAULT_GPU))
    if kind not in gpu_kinds():
        raise ConfigurationError(
            f"cluster.gpu={kind}: unknown kind; {choose_from(kind, gpu_kinds(), 'cluster')}, or describe your own "
            f"in {Path('configs/cluster') / (kind + '.yaml')}"
        )
    values = yaml.safe_load((GPU_DIRECTORY / f"{kind}.yaml").read_text())
    try:
        return ClusterConfig.model_validate(values | given), others
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        given_as = f"{PREFIX}{key}={shown(first['input'])}"
        if first["type"] == "extra_forbidden":
            fields = list(ClusterConfig.model_fields)
            near = [PREFIX + one for one in likely(key, fields)]
            hint = f"did you mean {either(near)}?" if near else f"known keys of cluster: {', '.join(fields)}"
            raise ConfigurationError(f"{given_as}: unknown key; {hint}") from error
        meant = expectation([first], PREFIX + key, ClusterConfig.model_fields.get(key))
        raise ConfigurationError(f"{given_as}: {meant}") from error


def compose_for(overrides: Sequence[str], cluster: ClusterConfig) -> tuple[RunConfig, list[str]]:
    """Return the run's configuration on the cluster, and notes on what was assumed.

    `auto` is resolved as on a GPU. A model without a recipe gets the paper's batch, length and number of steps, because
    the defaults are for a laptop. A batch that is not divisible by the ranks becomes the nearest one that is.
    """
    notes: list[str] = []
    given = {key_of(override) for override in overrides}
    values = compose_dictionary(overrides)
    model, train = values.get("model"), values.get("train")
    if not isinstance(model, dict) or not isinstance(train, dict):
        return validate(values), notes  # raises
    assumed: list[str] = []
    if "experiment" not in given:
        length = min(model["block_size"], 1024) if isinstance(model.get("block_size"), int) else 1024
        for key, value in {"global_batch_size": 480, "sequence_length": length, "steps": 100_000}.items():
            if f"train.{key}" not in given:
                train[key] = value
                assumed.append(f"train.{key}={value}")
        if assumed:
            notes.append(f"assumed, as in the paper: {' '.join(assumed)} (the defaults are for a laptop)")
    if not assumed and "train.global_batch_size" not in given and "train.micro_batch_size" not in given:
        train["micro_batch_size"] = fitting_micro_batch(train, cluster.gpus, notes)
    if isinstance(train.get("global_batch_size"), int) and train["global_batch_size"] % cluster.gpus:
        batch, gpus = train["global_batch_size"], cluster.gpus
        nearest = max(1, round(batch / gpus)) * gpus
        notes.append(
            f"train.global_batch_size={batch} is not divisible by {gpus} ranks, and train.py would refuse it: planned "
            f"with train.global_batch_size={nearest}"
        )
        train["global_batch_size"] = nearest
        train["micro_batch_size"] = fitting_micro_batch(train, gpus, notes)
    if train.get("precision", "auto") == "auto":
        train["precision"] = "bf16"
    if train.get("compile", "auto") == "auto":
        train["compile"] = True
    config = validate(values)
    if not config.model.is_gpt2:
        raise ConfigurationError(
            f"model.architecture={config.model.architecture}: the planner knows the memory of GPT-2 only; train a few steps, "
            "whose summary.json has peak_memory_bytes, or plan a GPT-2 of the same size"
        )
    if config.strategy.name == "single" and cluster.gpus > 1:
        raise ConfigurationError(f"strategy=single does not work with cluster.gpus={cluster.gpus}; choose strategy=ddp")
    return config, notes


def fitting_micro_batch(train: dict[str, Any], gpus: int, notes: list[str]) -> int | None:
    """Return the micro-batch if it divides a rank's share of the batch, else the nearest smaller one that does."""
    micro, batch = train.get("micro_batch_size"), train["global_batch_size"]
    if micro is None or batch % gpus or batch // gpus % micro == 0:
        return micro  # type: ignore[no-any-return]
    nearest = max(d for d in divisors(batch // gpus) if d <= micro)
    notes.append(
        f"train.micro_batch_size={micro} does not divide a rank's {batch // gpus} sequences: planned with {nearest}"
    )
    return nearest
