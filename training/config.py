"""The validated configuration: frozen models, and errors that name key, value and remedy.

Hydra composes YAML groups into a plain dictionary (training/compose.py). `RunConfig.model_validate` turns it into the
typed object below or fails. Nothing else reads a raw configuration.

The string below a key is its documentation: --help, --cfg job and the site show it (training/config_keys.py).
"""

import errno
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)


def whole(value: Any) -> Any:
    """Convert a whole float such as 1e3 to an integer; return anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_INT else value


MAX_INT = 2**63 - 1  # the limit of generators and counters
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT, strict=True), BeforeValidator(whole)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT, strict=True), BeforeValidator(whole)]
YEAR = 366 * 24 * 60  # minutes; much longer waits overflow
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Part of a path component (`run_name`, <data.name>-<tokenizer>), which file systems limit to 255 bytes.
NAME_CHARACTERS = 200
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=NAME_CHARACTERS)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# Anything less rounds to zero in float32, and 0 / 0 gives NaN weights.
Epsilon = Annotated[float, Field(ge=2.0**-126, allow_inf_nan=False)]


class ConfigurationError(ValueError):
    """A configuration that cannot be run. The message is one line: key, value, remedy."""


class PassingError(ConfigurationError):
    """A disk that is full, or a filesystem that does not answer. The same command may succeed."""


#: What an administrator or the passage of time mends: a full disk, a filesystem of the network that is away.
PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})


def refusal(message: str, cause: BaseException) -> ConfigurationError:
    """Return the error for a file that cannot be used: a `PassingError` if the OSError behind it may pass."""
    behind: BaseException | None = cause
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__
    return (PassingError if behind is not None and behind.errno in PASSING else ConfigurationError)(message)


class RunHeldError(ConfigurationError):
    """Another process holds the run directory; the message names it."""


class RankRefusedError(ConfigurationError):
    """Only this rank is refused, and it prints the message itself."""


class RanksNotMetError(RankRefusedError):
    """The ranks did not meet, or lost each other before all were there. The same command may succeed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# <module>:<callable>, code to import.
FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def callable_of(factory: str) -> str:
    """Return the callable's own name: NAdam for torch.optim:NAdam."""
    return factory.rpartition(":")[2].rpartition(".")[2]


class ModelConfig(Section):
    """A model's shape; the vocabulary is the tokenizer's. `init_from` is a directory of Hugging Face GPT-2 weights."""

    name: Name
    """Model name, part of the default run name."""
    architecture: str = "gpt2"
    """gpt2, or <module>:<callable> that builds a model of your own, such as examples.my_model:Rotary."""
    arguments: dict[str, JsonValue] = {}
    """Keyword arguments of an architecture of your own besides the keys of the shape; lists become tuples."""
    n_layer: PositiveInt
    """Transformer blocks."""
    n_head: PositiveInt
    """Attention heads per block; must divide n_embd."""
    n_embd: PositiveInt
    """Width of the residual stream."""
    block_size: PositiveInt = 1024
    """Longest context, in tokens."""
    bias: bool = False
    """Biases in the linear layers and layer norms."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability in training."""
    attention_layer_scaling: bool = False
    """Also divide the attention logits of layer i by i + 1 (a stability trick of the paper)."""
    init_from: str | None = None
    """Directory of Hugging Face GPT-2 weights to start from; null: random weights from seeds.model."""

    @property
    def is_gpt2(self) -> bool:
        """Whether the model is GPT-2, not one that `architecture` names."""
        return self.architecture == "gpt2"

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_architecture(cls, values: Any) -> Any:
        """Call gpt2_micro of my_model:Mine mine_micro: its records must not pass for GPT-2's."""
        if not isinstance(values, Mapping):
            return values
        name, architecture = values.get("name"), values.get("architecture")
        if not (isinstance(name, str) and isinstance(architecture, str) and FACTORY.fullmatch(architecture)):
            return values
        return {**values, "name": re.sub("^gpt2", callable_of(architecture).lower(), name)}

    @model_serializer(mode="wrap")
    def _as_recorded(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `architecture` and `arguments` of a GPT-2, as in records from before these keys existed."""
        values: dict[str, Any] = serialize(self)
        if self.is_gpt2:
            values = {key: value for key, value in values.items() if key not in ("architecture", "arguments")}
        return values

    @model_validator(mode="after")
    def _architecture_is_known(self) -> Self:
        if not self.is_gpt2 and not FACTORY.fullmatch(self.architecture):
            raise ValueError(
                f"model.architecture={self.architecture[:200]!r}: not gpt2, and not a module and a callable; give both, such "
                "as model.architecture=examples.my_model:Rotary"
            )
        if self.is_gpt2 and self.arguments:
            raise ValueError(
                f"model.arguments.{next(iter(self.arguments))}: model.architecture=gpt2 takes no arguments; set the keys of its "
                "shape, such as model.n_layer="
            )
        if not self.is_gpt2 and self.init_from is not None:
            raise ValueError(
                f"model.init_from={self.init_from}: GPT-2 weights, which model.architecture={self.architecture} cannot start "
                "from; choose model.init_from=null"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}; "
                f"choose model.n_embd={max(1, round(self.n_embd / self.n_head)) * self.n_head}"
            )
        return self


class ValidationSplitConfig(Section):
    """Which documents are for validation: by hash of the text, or by nanoGPT's shuffled row indices."""

    rule: Literal["hash", "nanogpt"] = "hash"
    """How validation documents are chosen: hash (of their text) or nanogpt (its shuffled row indices)."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents used for validation."""
    seed: NonNegativeInt = 2357
    """Seed of the split; independent of seed=."""


class SampleDataConfig(Section):
    kind: Literal["sample"]
    """Where documents come from: sample (embedded), hub (Hugging Face) or files (your own)."""
    name: Name
    """Corpus name, part of the token directory and of the default run name."""
    directory: str = "tokens"
    """Where token directories are kept."""


class HubDataConfig(Section):
    kind: Literal["hub"]
    """Where documents come from: sample (embedded), hub (Hugging Face) or files (your own)."""
    name: Name
    """Corpus name, part of the token directory and of the default run name."""
    repository: str
    """Dataset repository on the Hugging Face Hub."""
    revision: str
    """Commit of the repository."""
    files: str
    """Glob of the parquet files in the repository."""
    text_column: str = "text"
    """Column that holds the text."""
    local: str | None = None
    """Local directory with the same files; null: download from the Hub."""
    validation: ValidationSplitConfig
    directory: str = "tokens"
    """Where token directories are kept."""


class FilesDataConfig(Section):
    kind: Literal["files"]
    """Where documents come from: sample (embedded), hub (Hugging Face) or files (your own)."""
    name: Name
    """Corpus name, part of the token directory and of the default run name."""
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Globs of .txt, .jsonl, .jsonl.gz and .parquet files."""
    text_column: str = "text"
    """Column or JSON key that holds the text."""
    validation: ValidationSplitConfig
    directory: str = "tokens"
    """Where token directories are kept."""


DataConfig = Annotated[SampleDataConfig | HubDataConfig | FilesDataConfig, Field(discriminator="kind")]


class TokenizerConfig(Section):
    """`gpt2` (50,257 tokens, embedded) or a byte-level BPE of `vocab_size` tokens trained on the corpus."""

    name: Literal["gpt2", "bpe"] = "gpt2"
    """gpt2 (50,257 tokens, embedded) or bpe (byte-level, trained on the corpus)."""
    vocab_size: Annotated[int, Field(gt=256, le=2**24, strict=True), BeforeValidator(whole)] | None = None
    """Tokens of a bpe tokenizer; null for gpt2."""

    @model_validator(mode="after")
    def _size_belongs_to_bpe(self) -> Self:
        if self.name == "bpe" and self.vocab_size is None:
            raise ValueError("tokenizer.vocab_size is missing; give a size, for example tokenizer.vocab_size=4096")
        if self.name == "gpt2" and self.vocab_size not in (None, 50257):
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size} does not fit tokenizer=gpt2, which has 50257 tokens; "
                "use tokenizer=bpe for a vocabulary of your own size"
            )
        return self


class OptimizerSettings(Section):
    """Keys of every optimizer. The embeddings, which are also the output layer, train at lr · embedding_lr_ratio."""

    lr: PositiveFloat
    """Peak learning rate."""
    embedding_lr_ratio: PositiveFloat = 1.0
    """Learning rate of the embeddings (and the tied output layer) as a multiple of lr."""
    decay_embeddings: bool = True
    """Apply weight decay to token and position embeddings."""

    @property
    def label(self) -> str:
        """The optimizer's name in run names, messages and trackers."""
        return str(self.name)  # type: ignore[attr-defined]

    @property
    def curvature(self) -> "CurvatureSettings | None":
        """The keys of the curvature pass; None if the optimizer has none."""
        return None


class AdamWConfig(OptimizerSettings):
    name: Literal["adamw"]
    """The optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """β1 and β2: decay rates of the averages of gradient and squared gradient."""
    eps: Epsilon = 1e-8
    """ε, added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and embeddings."""


class LionConfig(OptimizerSettings):
    name: Literal["lion"]
    """The optimizer."""
    betas: tuple[Beta, Beta] = (0.95, 0.98)
    """β1 (in the update) and β2 (of the momentum)."""
    weight_decay: NonNegativeFloat
    """Decoupled weight decay of matrices and embeddings."""


class SignumConfig(OptimizerSettings):
    """Momentum-sign descent: Sophia with h = 0, the paper's "clip only" ablation."""

    name: Literal["signum"]
    """The optimizer."""
    betas: tuple[Beta] = (0.96,)
    """β1: decay rate of the momentum."""
    weight_decay: NonNegativeFloat
    """Decoupled weight decay of matrices and embeddings."""


class MuonConfig(OptimizerSettings):
    """torch.optim.Muon for the hidden matrices; AdamW (`betas`, `eps`) at the same rate for the rest."""

    name: Literal["muon"]
    """The optimizer."""
    momentum: Beta = 0.95
    """Momentum of the hidden matrices."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """β1 and β2 of AdamW, which trains the other parameters."""
    eps: Epsilon = 1e-8
    """ε of AdamW, which trains the other parameters."""


Estimator = Literal["gnb", "hutchinson", "hutchinson_differences", "empirical_fisher"]
# Their estimate is N g²: update_hessian gets N, with g in .grad. It gets the estimates of the others.
SQUARED_GRADIENTS: tuple[Estimator, ...] = ("gnb", "empirical_fisher")


class CurvatureSettings(OptimizerSettings):
    """Keys of every optimizer with a curvature pass."""

    hessian_interval: PositiveInt = 10
    """k: steps between curvature estimates."""
    batch_fraction: Fraction = 0.5
    """Share of the global batch used for the curvature estimate."""
    estimator: Estimator
    """Estimator of the Hessian's diagonal: gnb, hutchinson, hutchinson_differences or empirical_fisher."""

    @property
    def curvature(self) -> "CurvatureSettings | None":
        return self


# Keys that SophiaConfig had up to commit 3b433fa, with the values that switched them off (docs/decisions.md).
REMOVED: Mapping[str, Any] = {"bias_correction": False, "label_draws": 1, "warm_start": 0, "unclipped_target": None}
LAST_WITH_REMOVED = "3b433fa"


class SophiaConfig(CurvatureSettings):
    name: Literal["sophiag", "sophiah"]
    """The optimizer."""
    betas: tuple[Beta, Beta] = (0.96, 0.99)
    """β1 (of the momentum m) and β2 (of the curvature h)."""
    gamma: PositiveFloat
    """γ: the update is m / max(γh, ε); a larger γ clips fewer coordinates."""
    eps: Epsilon = 1e-12
    """ε: the smallest denominator."""
    weight_decay: NonNegativeFloat = 0.2
    """Decoupled weight decay of matrices and embeddings."""
    clip: bool = True
    """Clip each coordinate of the update to ±1."""
    hessian_power: PositiveFloat = 1.0
    """p: γ·c·max(h, 0)^p takes the place of γh; the paper has 1."""
    hessian_scale: PositiveFloat = 1.0
    """c, which keeps γ's meaning for p < 1: the typical curvature to the power 1 - p."""

    @model_validator(mode="after")
    def _power_has_a_clip(self) -> Self:
        if not self.clip and (self.hessian_power, self.hessian_scale) != (1, 1):
            raise ValueError(
                f"optimizer.clip=false does not work with optimizer.hessian_power={self.hessian_power} and "
                f"optimizer.hessian_scale={self.hessian_scale}; choose clip=true, or 1 for both"
            )
        return self


class AdaHessianConfig(CurvatureSettings):
    name: Literal["adahessian"]
    """The optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """β1 and β2: decay rates of the averages of gradient and squared curvature."""
    eps: Epsilon = 1e-4
    """ε, added to the root of the averaged squared curvature."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    estimator: Literal["hutchinson", "hutchinson_differences"] = "hutchinson"
    """Estimator of the Hessian's diagonal: hutchinson or hutchinson_differences."""


class ExternalConfig(OptimizerSettings):
    """Any torch.optim.Optimizer, imported from an installed package or the current directory (training/external.py)."""

    name: Literal["external"]
    """The optimizer."""
    factory: Annotated[str, Field(validate_default=True)] = ""
    """<module>:<callable> that builds the optimizer, such as torch.optim:NAdam."""
    arguments: dict[str, JsonValue] = {}
    """Keyword arguments of the factory besides lr and weight_decay; lists become tuples."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of matrices and embeddings; with groups=flat of all parameters."""
    groups: Literal["default", "matrices_apart", "flat"] = "default"
    """Parameter groups: default, matrices_apart (hidden matrices in their own, marked matrices=true) or flat (one)."""
    elementwise: bool = False
    """Whether each coordinate is updated independently of the others, as fsdp and deepspeed require."""
    estimator: Estimator | None = None
    """Estimator of the Hessian's diagonal for the class's update_hessian; null: no curvature pass."""
    hessian_interval: PositiveInt = 10
    """k: steps between curvature estimates."""
    batch_fraction: Fraction = 0.5
    """Share of the global batch used for the curvature estimate."""

    @field_validator("factory", mode="before")
    @classmethod
    def _module_and_callable(cls, value: Any) -> Any:
        example = "give the module and the callable, such as optimizer.factory=torch.optim:NAdam"
        if value in (None, ""):
            raise ValueError(f"optimizer.factory: missing; {example}")
        if not isinstance(value, str) or not FACTORY.fullmatch(value):
            raise ValueError(f"optimizer.factory={str(value)[:200]!r}: not a module and a callable; {example}")
        return value

    @model_validator(mode="after")
    def _flat_has_no_rule(self) -> Self:
        if self.groups == "flat" and (self.embedding_lr_ratio != 1 or not self.decay_embeddings):
            key = "embedding_lr_ratio" if self.embedding_lr_ratio != 1 else "decay_embeddings"
            raise ValueError(
                f"optimizer.{key}: has no effect with optimizer.groups=flat, one group for all parameters; choose "
                "optimizer.groups=default"
            )
        return self

    @property
    def label(self) -> str:
        """The callable's name in lower case: nadam for torch.optim:NAdam."""
        return callable_of(self.factory).lower()

    @property
    def curvature(self) -> CurvatureSettings | None:
        if self.estimator is None:
            return None
        return CurvatureSettings(
            lr=self.lr,
            estimator=self.estimator,
            hessian_interval=self.hessian_interval,
            batch_fraction=self.batch_fraction,
        )


OptimizerConfig = Annotated[
    AdamWConfig | LionConfig | SignumConfig | MuonConfig | SophiaConfig | AdaHessianConfig | ExternalConfig,
    Field(discriminator="name"),
]


class ScheduleConfig(Section):
    """The learning rate over steps, as a factor of the peak."""

    name: Literal["cosine", "wsd", "constant"]
    """Learning rate after warm-up: cosine, wsd (stable, then linear decay) or constant."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up; null: use warmup_share."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the run spent on warm-up if warmup_steps is null."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Final learning rate as a fraction of the peak (cosine, wsd)."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the run in which wsd decays."""

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        """Recipes, studies and records give ignored keys their defaults, of the file in configs/schedule or above."""
        ignored: dict[str, tuple[float, ...]] = {} if self.name == "wsd" else {"decay_share": (0.2,)}
        if self.name == "constant":
            ignored["final_ratio"] = (1.0, 0.05)
        for key, defaults in ignored.items():
            if (value := getattr(self, key)) not in defaults:
                others = "wsd" if key == "decay_share" else "cosine or wsd"
                raise ValueError(
                    f"schedule.{key}={value}: has no effect with schedule={self.name}; leave it out (schedule.{key}="
                    f"{defaults[0]}), or choose schedule={others}"
                )
        return self

    def warmup(self, steps: int) -> int:
        """Return the number of warm-up steps in a run of `steps` steps, at most all but the last."""
        return min(steps - 1, round(self.warmup_share * steps)) if self.warmup_steps is None else self.warmup_steps


class DDPConfig(Section):
    """Replicas with averaged gradients; a plain single process at world size 1. `single` refuses more than one rank."""

    name: Literal["ddp", "single"]
    """ddp (replicas; a plain process at world size 1), single (one process), fsdp or deepspeed."""


class FSDPConfig(Section):
    name: Literal["fsdp"]
    """ddp (replicas; a plain process at world size 1), single (one process), fsdp or deepspeed."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward: less memory, more compute."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward: less memory, more communication."""


class DeepSpeedConfig(Section):
    name: Literal["deepspeed"]
    """ddp (replicas; a plain process at world size 1), single (one process), fsdp or deepspeed."""
    zero_stage: Annotated[PositiveInt, Field(le=3)] = 2
    """What ZeRO shards: 1 optimizer state, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep the optimizer state and its update on the CPU."""


StrategyConfig = Annotated[DDPConfig | FSDPConfig | DeepSpeedConfig, Field(discriminator="name")]


class SeedsConfig(Section):
    model: NonNegativeInt
    """Seed of the initial weights and of dropout; default: the value of seed."""
    data: NonNegativeInt
    """Seed of the order of the sequences; default: the value of seed."""
    curvature: NonNegativeInt
    """Seed of sampled labels and Hutchinson's noise; default: the value of seed."""


class TrainConfig(Section):
    steps: PositiveInt
    """Number of optimizer steps."""
    global_batch_size: PositiveInt
    """Sequences per step, over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Sequences per forward on each rank; null: no accumulation."""
    sequence_length: PositiveInt
    """Tokens per sequence; at most model.block_size."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto, fp32 or bf16 (autocast; weights stay fp32). auto: bf16 if the hardware supports it."""
    compile: Literal["auto"] | bool = "auto"
    """auto, true or false: torch.compile. auto: if a compiler works."""
    shared_forward: bool = True
    """Sample gnb's labels in the training forward if the strategy can (ddp, single)."""
    grad_clip: PositiveFloat | None = 1.0
    """Maximum norm of the mean gradient; null: no clipping."""
    deterministic: bool = False
    """Deterministic kernels, for the same curve bit for bit when a run resumes on CUDA; no GPU has run this yet."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda. auto: CUDA if available."""
    max_skipped_steps: NonNegativeInt = 10
    """Non-finite steps allowed in a row; one more ends the run as diverged."""


class EvalConfig(Section):
    interval: PositiveInt
    """Steps between evaluations."""
    tokens: PositiveInt | None = None
    """Validate on the first so many validation tokens; null: the whole set."""
    micro_batch_size: PositiveInt | None = None
    """Sequences per forward; null: as in training."""


class CheckpointConfig(Section):
    """When to save checkpoints and which to keep. `keep_best` considers checkpoints whose step was also evaluated."""

    interval: PositiveInt | None = None
    """Steps between checkpoints; null: only at the end."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Also keep checkpoints at multiples of this many steps; null: none."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    export_at: tuple[PositiveInt, ...] = ()
    """Steps after which the run also exports Hugging Face weights, to <run>/exports/step-…."""


class GuardsConfig(Section):
    """Checks during a run. None of them changes the curve."""

    spike_deviations: PositiveFloat | None = 6.0
    """Record a loss this many standard deviations above its running mean as a spike; null: never."""
    weights_interval: PositiveInt | None = 100
    """Steps between comparisons of the ranks' weights; null: never."""
    hang_minutes: Annotated[PositiveFloat, Field(le=YEAR)] | None = 10.0
    """Minutes without progress after which the run prints all ranks' stacks and stops; null: never."""


class TrackerConfig(Section):
    name: Literal["none", "wandb", "tensorboard"]
    """Mirror of the run record: none, wandb or tensorboard."""
    project: str = "sophia"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null: your account's default."""
    group: str | None = None
    """W&B group; null: <model>-<data>."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
    artifacts: bool = False
    """Upload the record and the last checkpoint as a W&B artifact when the run has completed."""


class LocalLauncherConfig(Section):
    """Ranks on this machine, or on `nodes` machines that all run the same command; a sweep runs its trials in turn."""

    name: Literal["local"] = "local"
    """Where runs start: local, joblib, slurm or submitit."""
    nproc_per_node: PositiveInt = 1
    """Ranks that train.py starts on this machine."""
    max_restarts: NonNegativeInt = 0
    """Restarts from the last checkpoint after a rank has died; with several ranks only."""
    nodes: PositiveInt = 1
    """Machines of the run; start the same command on each."""
    head: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]{1,5})?$")] | None = None
    """The machine where the ranks of several nodes meet, by name or address; its port is 29500 or as in node-1:29501."""

    @model_validator(mode="after")
    def _nodes_meet(self) -> Self:
        if self.nodes > 1 and self.head is None:
            raise ValueError(
                f"launcher.head: missing with launcher.nodes={self.nodes}; name one of the machines, for example "
                "launcher.head=node-1"
            )
        return self


class JoblibLauncherConfig(Section):
    """Ranks on this machine; a sweep runs `trials` trials at a time."""

    name: Literal["joblib"]
    """Where runs start: local, joblib, slurm or submitit."""
    trials: PositiveInt = 2
    """Trials of a sweep that run at a time."""
    nproc_per_node: PositiveInt = 1
    """Ranks per trial."""
    max_restarts: NonNegativeInt = 0
    """Restarts from the last checkpoint after a rank has died; with several ranks only."""
    nodes: ClassVar[int] = 1
    head: ClassVar[str | None] = None


# These are written into the job script.
SlurmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,:/+-]*$")]


class SlurmLauncherConfig(Section):
    """SLURM jobs with one rank per task; `submitit` starts processes on this machine instead."""

    name: Literal["slurm", "submitit"]
    """Where runs start: local, joblib, slurm or submitit."""
    nodes: PositiveInt = 1
    """Nodes per job."""
    nproc_per_node: PositiveInt = 1
    """Tasks per node, one rank each."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs per node; null: no request, for a partition without GPUs."""
    cpus_per_task: PositiveInt | None = None
    """CPU cores per task; null: the cluster's default."""
    mem_gb: PositiveInt | None = None
    """Memory per node in GB; null: the cluster's default."""
    partition: SlurmName | None = None
    """SLURM partition; null: the default."""
    account: SlurmName | None = None
    """SLURM account; null: the default."""
    qos: SlurmName | None = None
    """SLURM quality of service; null: the default."""
    timeout_minutes: Annotated[PositiveInt, Field(le=YEAR)] = 1440
    """Time limit of a job in minutes."""
    signal_seconds: Annotated[PositiveInt, Field(le=65535)] = 120  # sbatch's maximum
    """Seconds before the time limit at which the run gets the signal to save; slurm only."""
    requeue: bool = True
    """Requeue a job that reached its time limit."""
    parallel: PositiveInt = 256
    """Jobs of a sweep that run at a time."""
    setup: tuple[str, ...] = ()
    """Shell commands to run before the ranks start; only the command line may set them."""

    @model_validator(mode="after")
    def _signal_before_the_end(self) -> Self:
        if self.name == "slurm" and self.signal_seconds >= 60 * self.timeout_minutes:
            raise ValueError(
                f"launcher.signal_seconds={self.signal_seconds} is not shorter than launcher.timeout_minutes="
                f"{self.timeout_minutes}; leave time to train, for example "
                f"launcher.signal_seconds={min(120, 30 * self.timeout_minutes)}"
            )
        return self


LauncherConfig = Annotated[
    LocalLauncherConfig | JoblibLauncherConfig | SlurmLauncherConfig, Field(discriminator="name")
]


class ProfileConfig(Section):
    """A torch.profiler trace of `steps` steps, after the first `after` steps."""

    enabled: bool = False
    """Write a torch.profiler trace and a table of the most expensive operations."""
    after: NonNegativeInt = 5
    """Steps before the trace."""
    steps: PositiveInt = 3
    """Steps in the trace."""


def _profiled(value: Any) -> Any:
    """`profile=true` is short for `profile.enabled=true`."""
    return {"enabled": value} if isinstance(value, bool) else value


class RunConfig(Section):
    """The configuration of a run. `run_name` derives the name if `name` is null."""

    name: Name | None = None
    """Name of the run directory; null: <model>-<data>-<optimizer>-<hash>-s<seed>."""
    seed: NonNegativeInt = 0
    """Sets seeds.model, seeds.data and seeds.curvature."""
    output_dir: str = "runs"
    """Parent directory of the run directories."""
    resume: str = "auto"
    """auto (resume an unfinished run), never (refuse an existing run), or the path of a run or a checkpoint."""
    overwrite: bool = False
    """Replace an existing run of the same name."""
    allow_code: Annotated[bool, Field(exclude=True)] = False  # not recorded: a record cannot vouch for itself
    """Run the code that a configuration from elsewhere names; counts on the command line only."""
    seeds: SeedsConfig
    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    strategy: StrategyConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    guards: GuardsConfig = GuardsConfig()
    tracker: TrackerConfig
    launcher: LauncherConfig
    profile: Annotated[ProfileConfig, BeforeValidator(_profiled)] = ProfileConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.train.sequence_length > self.model.block_size:
            raise ValueError(
                f"train.sequence_length={self.train.sequence_length} is longer than "
                f"model.block_size={self.model.block_size}; shorten the sequences or raise model.block_size"
            )
        if self.train.micro_batch_size is not None and self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size={self.train.micro_batch_size} does not divide "
                f"train.global_batch_size={self.train.global_batch_size}; "
                + nearest_batches(self.train.global_batch_size, self.train.micro_batch_size, 1)
            )
        if len(self.run_name) > NAME_CHARACTERS:
            raise ValueError(
                f"name: {self.run_name} is longer than {NAME_CHARACTERS} characters; shorten model.name or "
                "data.name, or give name="
            )
        if self.schedule.warmup_steps is not None and self.schedule.warmup_steps >= self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is not less than train.steps={self.train.steps}; "
                "choose fewer warm-up steps"
            )
        if self.checkpoint.export_at and not self.model.is_gpt2:
            raise ValueError(
                f"checkpoint.export_at={list(self.checkpoint.export_at)}: transformers has no class for "
                f"model.architecture={self.model.architecture}; leave checkpoint.export_at out"
            )
        if late := [step for step in self.checkpoint.export_at if step > self.train.steps]:
            raise ValueError(
                f"checkpoint.export_at={list(self.checkpoint.export_at)}: step {late[0]} is after train.steps="
                f"{self.train.steps}; leave it out, or choose checkpoint.export_at=[{self.train.steps}] for the last step"
            )
        refuse_impossible_pairs(self)
        ranks = self.launcher.nproc_per_node * self.launcher.nodes
        if ranks > 1:
            if self.strategy.name == "single":
                raise ValueError(
                    f"strategy=single does not work with the {ranks} ranks of launcher.nproc_per_node="
                    f"{self.launcher.nproc_per_node} and launcher.nodes={self.launcher.nodes}; choose strategy=ddp, or "
                    "launcher.nproc_per_node=1 launcher.nodes=1"
                )
            micro_batch_size(self, ranks)
        return self

    @property
    def run_name(self) -> str:
        """`name`, or `<model>-<data>-<optimizer>-<hash of the config>-s<seed>` if it is null."""
        if self.name is not None:
            return self.name
        return f"{self.model.name}-{self.data.name}-{self.optimizer.label}-{self.identity_hash()[:8]}-s{self.seed}"

    @property
    def estimator(self) -> str | None:
        """The curvature estimator, None without one."""
        return self.optimizer.curvature.estimator if self.optimizer.curvature else None

    def identity(self) -> dict[str, Any]:
        """Return the keys that determine the curve, except the seed. Equal identity and seed mean the same run."""
        full = self.model_dump(mode="json")
        for key in ("name", "seed", "output_dir", "resume", "overwrite"):
            del full[key]
        for key in ("strategy", "tracker", "launcher", "checkpoint", "guards", "profile"):
            del full[key]
        for key in ("micro_batch_size", "compile", "shared_forward", "deterministic", "device"):
            del full["train"][key]
        del full["eval"]["micro_batch_size"]
        del full["data"]["directory"]
        full["data"].pop("local", None)
        if set(full["seeds"].values()) == {self.seed}:
            del full["seeds"]
        if self.optimizer.decay_embeddings:  # runs from before this key existed have the same identity
            del full["optimizer"]["decay_embeddings"]
        full["optimizer"].pop("elementwise", None)  # says where the run may train, not how
        for key in ("hessian_power", "hessian_scale"):
            if full["optimizer"].get(key) == 1:
                del full["optimizer"][key]
        return full

    def shared_by_ranks(self) -> dict[str, Any]:
        """Return the keys that must agree on all ranks: all but local paths and keys that only rank 0 reads."""
        full = self.model_dump(mode="json") | {"name": self.run_name}
        for key in ("output_dir", "resume", "overwrite", "tracker", "launcher", "profile"):
            del full[key]
        del full["train"]["device"]
        del full["data"]["directory"]
        full["data"].pop("local", None)
        return full

    def identity_hash(self) -> str:
        identity = self.identity()
        if isinstance(self.optimizer, SophiaConfig):  # keep the derived names of earlier versions
            identity["optimizer"] |= REMOVED
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def refuse_impossible_pairs(config: RunConfig) -> None:
    """Raise ValueError if strategy and optimizer cannot work together; the message says what to choose instead."""
    sharded_parameters = isinstance(config.strategy, FSDPConfig) or (
        isinstance(config.strategy, DeepSpeedConfig) and config.strategy.zero_stage == 3
    )
    where: str = config.strategy.name
    if isinstance(config.strategy, DeepSpeedConfig):
        where = f"deepspeed strategy.zero_stage={config.strategy.zero_stage}"
    if config.estimator == "hutchinson" and sharded_parameters:
        raise ValueError(
            f"optimizer.estimator=hutchinson does not work with strategy={where}: double backward fails on sharded "
            "parameters; choose optimizer.estimator=hutchinson_differences or gnb, or strategy=ddp"
        )
    if isinstance(config.optimizer, MuonConfig) and isinstance(config.strategy, DeepSpeedConfig):
        raise ValueError(
            f"optimizer=muon does not work with strategy={where}: ZeRO hands the optimizer flat shards, Muon needs "
            "whole matrices; choose strategy=ddp or strategy=fsdp"
        )
    sharded_state = isinstance(config.strategy, (FSDPConfig, DeepSpeedConfig))
    if isinstance(config.optimizer, ExternalConfig) and sharded_state and not config.optimizer.elementwise:
        raise ValueError(
            f"optimizer.factory={config.optimizer.factory} does not work with strategy={where}, which hands it shards of "
            "the parameters; choose strategy=ddp, or optimizer.elementwise=true if it updates each coordinate independently"
        )


def divisors(number: int) -> list[int]:
    """Return all divisors in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_batches(global_batch_size: int, micro_batch_size: int, world_size: int) -> str:
    """Return the remedy for a batch that does not divide: the nearest valid micro-batches and batches."""
    unit = micro_batch_size * world_size
    remedies = []
    if global_batch_size % world_size == 0:
        valid = divisors(global_batch_size // world_size)
        below = [d for d in valid if d <= micro_batch_size][-1:]
        above = [d for d in valid if d > micro_batch_size][:1]
        remedies.append("train.micro_batch_size=" + " or ".join(map(str, below + above)))
    lower, upper = global_batch_size // unit * unit, -(-global_batch_size // unit) * unit
    remedies.append("train.global_batch_size=" + " or ".join(str(b) for b in dict.fromkeys((lower, upper)) if b))
    return "choose " + ", or ".join(remedies)


def micro_batch_size(config: RunConfig, world_size: int) -> int:
    """Return the sequences per forward on each rank. Raises ConfigurationError, with remedies, if nothing divides."""
    batch = config.train.global_batch_size
    micro = config.train.micro_batch_size
    if micro is None:
        if batch % world_size:
            raise ConfigurationError(
                f"train.global_batch_size={batch} is not divisible by {world_size} ranks; "
                + nearest_batches(batch, 1, world_size)
            )
        return batch // world_size
    if batch % (micro * world_size):
        raise ConfigurationError(
            f"train.global_batch_size={batch} is not a multiple of train.micro_batch_size={micro} times {world_size} ranks; "
            + nearest_batches(batch, micro, world_size)
        )
    return micro
