"""Open a run's newest valid checkpoint and draw text from its model.

trained = open_trained(Path("runs/<name>"))
ids = generate(trained.model, prompt, 200, Sampling(temperature=0.8), 0, trained.tokenizer.end_of_text)
for text in as_text(trained.tokenizer, ids):
    print(text, end="", flush=True)
"""

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import DataError
from data.files import cannot_use
from data.manifest import load_manifest
from data.tokenizers import Tokenizer, gpt2, open_tokenizer
from models import LanguageModel
from training.architectures import build_model
from training.compose import validate_recorded
from training.config import ConfigurationError, RunConfig
from training.corpus import token_directory_of
from training.records import CONFIG_FILE, RecordError, RunRecord
from training.reliability.checkpoints import MANIFEST_FILE, Checkpoint, CheckpointError, RunState, newest_valid
from training.reliability.run_directory import refuse_absent

#: The errors of opening a run and using its model; each message is one line for the user.
OPENING_ERRORS = (ConfigurationError, RecordError, CheckpointError, DataError)


@dataclass(frozen=True)
class TrainedModel:
    """A model from a checkpoint, with everything needed to use it."""

    model: LanguageModel  # float32, in evaluation mode, without gradients
    tokenizer: Tokenizer
    config: RunConfig  # of the run that trained it
    checkpoint: Path
    step: int  # updates made
    state: RunState  # of the checkpoint
    data_manifest_sha256: str | None  # of the tokens that it was trained on
    run: RunRecord | None  # None for a checkpoint outside a run directory
    passed_over: tuple[str, ...]  # a line about each damaged newer checkpoint


def choose_device(name: str) -> torch.device:
    """The device for "auto" (CUDA if available), "cpu" or "cuda".

    Raises:
        ConfigurationError: there is no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device=cuda: no CUDA device is visible; choose cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def open_trained(
    path: Path, *, device: torch.device | str = "cpu", tokens: Path | None = None, allow_code: bool = False
) -> TrainedModel:
    """The model of a run's newest valid checkpoint, or of the given checkpoint.

    Args:
        path: a run directory, runs/<name>, or a checkpoint in one, runs/<name>/checkpoints/step-….
        device: the device of the weights.
        tokens: the run's token directory, for its trained tokenizer, if it has moved from the path in the run's
            configuration. GPT-2's own tokenizer needs none.
        allow_code: whether to import the architecture that the checkpoint names, if it is no GPT-2.

    Raises:
        ConfigurationError: there is no such directory, its configuration is not valid, or it names code to run.
        RecordError: the directory is not a run record.
        CheckpointError: no checkpoint is valid, or the given one is damaged.
        DataError: the tokenizer is missing or is not the run's, or a file cannot be read.
    """
    try:
        return _open(path, device, tokens, allow_code)
    except OSError as error:
        raise cannot_use(error, path) from error


def _open(path: Path, device: torch.device | str, tokens: Path | None, allow_code: bool) -> TrainedModel:
    refuse_absent(path)
    run = _run_of(path)
    passed_over: list[str] = []
    if run is not None and run.directory == path:
        newest, passed_over = newest_valid(path / "checkpoints")
        if newest is None:
            reason = "; ".join(passed_over) or f"there is none in {path / 'checkpoints'}"
            raise CheckpointError(f"{path} has no valid checkpoint: {reason}")
        checkpoint = newest
    else:
        checkpoint = Checkpoint(path)
    config = _config_of(checkpoint)
    if not (config.model.is_gpt2 or allow_code):
        raise ConfigurationError(
            f"model.architecture={config.model.architecture}: {checkpoint.directory} is no GPT-2, so scripts/export.py and "
            "scripts/evaluate.py cannot use it; if you trust the code that it names, scripts/sample.py runs it with --allow-code"
        )
    trained_on = checkpoint.state.data_manifest_sha256
    if trained_on is None and run is not None:  # a checkpoint of an earlier version
        trained_on = run.environment.get("data_manifest_sha256")
    tokenizer = _tokenizer_of(config, trained_on, tokens)
    model = _load(checkpoint, build_model(config.model, tokenizer.vocab_size))
    return TrainedModel(
        model.to(device),
        tokenizer,
        config,
        checkpoint.directory,
        checkpoint.step,
        checkpoint.state,
        trained_on,
        run,
        tuple(passed_over),
    )


def _run_of(path: Path) -> RunRecord | None:
    """The run at the path, or the run that contains the checkpoint at the path."""
    if not (path / MANIFEST_FILE).is_file():
        return RunRecord.open(path)
    directory = path.absolute().parent.parent
    return RunRecord.open(directory) if (directory / CONFIG_FILE).is_file() else None


def _config_of(checkpoint: Checkpoint) -> RunConfig:
    try:
        return validate_recorded(checkpoint.state.config)
    except ConfigurationError as error:
        raise ConfigurationError(f"the configuration of {checkpoint.directory} is not valid: {error}") from error


def _tokenizer_of(config: RunConfig, trained_on: str | None, tokens: Path | None) -> Tokenizer:
    if config.tokenizer.name == "gpt2":
        return gpt2()
    directory = token_directory_of(config) if tokens is None else tokens
    try:
        manifest = load_manifest(directory)
    except DataError as error:
        raise DataError(
            f"the run's tokenizer is missing: {error}; or name the run's token directory with --token-directory"
        ) from error
    if trained_on not in (None, manifest.sha256):
        raise DataError(
            f"{directory} holds other tokens (manifest {manifest.sha256[:12]}) than the run was trained on "
            f"({trained_on[:12]}), so its ids may mean other text; name the run's token directory with "
            "--token-directory"
        )
    return open_tokenizer(manifest.tokenizer, directory)


def _load(checkpoint: Checkpoint, model: LanguageModel) -> LanguageModel:
    weights = {}
    for name, parameter in model.named_parameters():
        found = checkpoint.shape(f"model.{name}")
        if found != tuple(parameter.shape):
            raise CheckpointError(
                f"{checkpoint.directory}: {name} has shape {found}, but its configuration implies "
                f"{tuple(parameter.shape)}"
            )
        weights[name] = checkpoint.weights(name).float()
        if not weights[name].isfinite().all():
            raise CheckpointError(f"{checkpoint.directory}: {name} is not finite: the run had diverged")
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token from the model's distribution.

    The temperature applies first, then `top_k`, then `top_p` to the remaining tokens.

    Raises:
        ConfigurationError: a value is out of range.
    """

    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # None: all
    top_p: float = 1.0  # nucleus sampling (Holtzman et al. 2020); 1: all

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigurationError(f"temperature={self.temperature}: expected 0 (greedy) or more, for example 0.8")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigurationError(f"top_k={self.top_k}: expected a number of tokens, at least 1")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p={self.top_p}: expected a probability above 0 and at most 1")


def next_token_distribution(
    logits: Tensor,  # (V,)
    sampling: Sampling,
) -> Tensor:  # (V,) float64, sums to 1
    """The distribution of the next token. Between equal logits, the lower id counts as likelier."""
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(), logits.numel()).double()
    ordered, order = logits.double().sort(descending=True, stable=True)
    probabilities = ((ordered - ordered[0]) / sampling.temperature).softmax(dim=-1)
    if sampling.top_k is not None:
        probabilities[sampling.top_k :] = 0
    if sampling.top_p < 1:
        mass = probabilities.cumsum(dim=-1)
        probabilities[mass - probabilities >= sampling.top_p * mass[-1]] = 0
    return torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())


def generate(
    model: LanguageModel,
    prompt: Sequence[int],  # ids, at least one; only the last block_size matter
    length: int,  # tokens to draw
    sampling: Sampling,
    seed: int,
    end_of_text: int,  # the id that ends the text; it is not returned
) -> Iterator[int]:
    """The ids that follow the prompt, one at a time.

    A pure function of its arguments: draws come from a generator on the CPU, whatever the model's device.

    Raises:
        ValueError: the prompt is empty.
    """
    if not len(prompt):
        raise ValueError("the prompt is empty; start a new text with [end_of_text]")
    generator = torch.Generator().manual_seed(seed)
    context = [int(token) for token in prompt]
    for _ in range(length):
        distribution = next_token_distribution(_next_logits(model, context[-model.block_size :]), sampling)
        token = int(distribution.multinomial(1, generator=generator))
        if token == end_of_text:
            return
        yield token
        context.append(token)


@torch.inference_mode()
def _next_logits(model: LanguageModel, context: Sequence[int]) -> Tensor:
    """(vocab_size,) float32 on the CPU: the logits of the token after the context, without padding rows."""
    weight = model.output_weight[: model.vocab_size]
    hidden = model.hidden(torch.tensor([context], device=weight.device))
    return F.linear(hidden[0, -1], weight).float().cpu()


def as_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they arrive. A character made of several tokens is held back until it is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if text := decoder.decode(tokenizer.decode_bytes([token])):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
