"""Export a trained model to a Hugging Face directory, which transformers loads without this project.

    config.json, generation_config.json   the architecture, and the token that ends a text
    model.safetensors                     float32, the vocabulary without its padding
    tokenizer.json, tokenizer_config.json the run's tokenizer, GPT-2's or a trained one
    training.json, README.md              its run and step, for machines and for people (the Hub's model card)

The directory is written under a temporary name, loaded, compared with the model, and renamed. `upload` sends it to the
Hugging Face Hub.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data.files import entries, read_json, sync_directory, take_usual_mode
from data.tokenizers import END_OF_TEXT, TOKENIZER_FILE, Tokenizer
from downstream.inference import TrainedModel
from models import GPT2
from training.config import ConfigurationError
from training.records import RunRecord
from training.secrets import redacted

TRAINING_FILE = "training.json"
#: Every name in an export; a directory with other names is not replaced.
OWN_NAMES = {
    r"(generation_|tokenizer_)?config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json": None,
    r"tokenizer\.json|training\.json|README\.md": None,
}
TOLERANCE = 1e-5  # of the largest logit
# Letters, digits, contractions, runs of white space and characters of two, three and four bytes.
PROBE_TEXT = "It's the 1st of May,\n\n  isn't it?\tNaïve – 中文 🙂 <- (x += 1);  \r\n"


class ExportError(RuntimeError):
    """The exported directory does not reproduce the model's logits or the tokenizer's ids; it is removed."""


def export(trained: TrainedModel, directory: Path, *, overwrite: bool = False, licence: str | None = None) -> float:
    """Write the model and its tokenizer to `directory`; return the largest difference between their logits.

    Args:
        trained: the model, on the CPU.
        directory: is created; may exist if it is empty, or if it holds only an export and `overwrite` is set.
        licence: of the weights, as the Hub's identifier; None if it is not stated.

    Raises:
        ConfigurationError: the directory holds something else, or cannot be written, or the model is no GPT-2.
        ExportError: what transformers loads differs from the model.
    """
    model = trained.model
    if not isinstance(model, GPT2):
        raise ConfigurationError(
            f"model.architecture={trained.config.model.architecture}: transformers has no class for it here; export a GPT-2"
        )
    place = directory.absolute()
    partial, replaced = (place.with_name(f".{place.name}.{os.getpid()}.{end}") for end in ("partial", "replaced"))
    try:
        _refuse_to_replace(directory, overwrite)
        partial.mkdir(parents=True)
        _write(trained, model, partial, licence)
        difference = _compare(model, trained.tokenizer, partial)
        for file in partial.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if directory.exists():
            place.rename(replaced)
        try:
            partial.rename(place)
        except OSError:
            if replaced.exists():
                replaced.rename(place)
            raise
        sync_directory(place.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"{directory} cannot be written: {reason}; free space, or choose another directory"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


def _refuse_to_replace(directory: Path, overwrite: bool) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if directory.is_symlink() or not (directory / TRAINING_FILE).is_file():
        raise ConfigurationError(f"{directory} exists and is not an export; choose another directory")
    if foreign := [path.name for path, own in entries(directory, OWN_NAMES) if not own or path.is_symlink()]:
        raise ConfigurationError(
            f"{directory} holds {', '.join(foreign[:3])} besides an export; move it, or choose another directory"
        )
    if not overwrite:
        raise ConfigurationError(f"{directory} already holds an export; add --overwrite, or choose another directory")


def _write(trained: TrainedModel, model: GPT2, directory: Path, licence: str | None) -> None:
    from models.huggingface import to_huggingface

    converted = to_huggingface(model)
    converted.generation_config.pad_token_id = trained.tokenizer.end_of_text  # generate() warns without one
    converted.save_pretrained(directory)
    for weights in directory.glob("*.safetensors"):
        take_usual_mode(weights)
    (directory / TOKENIZER_FILE).write_text(trained.tokenizer.to_huggingface().to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": model.block_size,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    described = describe(trained) | {"licence": licence}
    (directory / TRAINING_FILE).write_text(json.dumps(described, indent=2) + "\n")
    (directory / "README.md").write_text(_model_card(described), encoding="utf-8")


def describe(trained: TrainedModel) -> dict[str, Any]:
    """The model's run, step and configuration as JSON values, without this machine's paths."""
    config = trained.config
    identity = config.identity()
    identity["data"].pop("paths", None)
    if identity["model"]["init_from"] is not None:
        identity["model"]["init_from"] = Path(identity["model"]["init_from"]).name
    evaluated = {} if trained.run is None else {line["step"]: line for line in trained.run.metrics("eval")}
    line = evaluated.get(trained.step, {})
    environment = {} if trained.run is None else trained.run.environment
    git = environment.get("git", {})
    began_with = _other_checkpoint(trained)
    tokens = trained.step * config.train.global_batch_size * config.train.sequence_length
    return {
        "run": config.run_name,
        "step": trained.step,
        "began_with": began_with or identity["model"]["init_from"],
        "tokens": None if began_with else tokens,  # another run's steps may have had another batch
        "val_loss": line.get("val_loss", trained.state.val_loss),
        "val_bits_per_byte": line.get("val_bits_per_byte"),
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "seed": config.seed,
        "config": identity,
        "data_manifest_sha256": trained.data_manifest_sha256,
        "git_commit": git.get("commit"),
        "git_dirty": git.get("dirty"),
        "resumed_under": [] if trained.run is None else _resumed_under(trained.run, trained.step),
    }


def _other_checkpoint(trained: TrainedModel) -> str | None:
    """The checkpoint of another run with which the run began, without its path on this machine."""
    recorded = trained.config.model_dump() if trained.run is None else trained.run.config
    resume = recorded.get("resume", "auto")
    if resume in ("auto", "never"):
        return None
    path = Path(resume)
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == "checkpoints" else path.name


def _resumed_under(run: RunRecord, step: int) -> list[str]:
    """The commits other than the first, as in the card, under which the run made steps before this one."""
    events = (line for line in run.metrics("event") if line["event"] == "resumed" and line["step"] < step)
    commits = (_commit(git["commit"], git.get("dirty")) for line in events if (git := line.get("git")))
    return list(dict.fromkeys(commits))


def _commit(commit: str | None, dirty: bool | None) -> str:
    return (_if("commit {}", commit) or "commit unknown") + " with uncommitted changes" * bool(dirty)


def _model_card(described: dict[str, Any]) -> str:
    """Return the Hub's card: everything in it but the licence is from the record."""
    config, loss = described["config"], described["val_loss"]
    optimizer = {key: value for key, value in config["optimizer"].items() if key != "name"}
    rows = {
        "model": f"{config['model']['name']}, {described['parameters']:,} parameters",
        "context": f"{config['model']['block_size']} tokens",
        "tokenizer": config["tokenizer"]["name"],
        "data": config["data"]["name"] + _if(" ({:.12})", described["data_manifest_sha256"]),
        "began with": described["began_with"] or "random weights",
        "trained for": f"{described['step']:,} of {config['train']['steps']:,} steps"
        + (_if(", {:,} tokens", described["tokens"]) or ", the steps of the run it began with included"),
        "batch": f"{config['train']['global_batch_size']} sequences of {config['train']['sequence_length']} tokens",
        "optimizer": config["optimizer"]["name"],
        "its settings": ", ".join(f"{key} {value}" for key, value in optimizer.items()),
        "validation loss": "no evaluation at this step"
        if loss is None
        else f"{loss:.4f} nats per token" + _if(", {:.4f} bits per byte", described["val_bits_per_byte"]),
        "seed": described["seed"],
        "code": "; resumed under ".join(
            [_commit(described["git_commit"], described["git_dirty"]), *described["resumed_under"]]
        ),
        "licence": described["licence"] or "not stated",
    }
    licence = _if("license: {}\n", described["licence"])
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{licence}---\n\n"
        f"# {described['run']}\n\n| | |\n| --- | --- |\n{table}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(directory)\n"
        "model = AutoModelForCausalLM.from_pretrained(directory)\n```\n\n"
        f"A text starts after `{END_OF_TEXT}` and ends with it. `{TRAINING_FILE}` has the whole configuration.\n"
    )


def _if(text: str, value: Any) -> str:
    return "" if value is None else text.format(value)


def refuse_hub_name(name: str) -> None:
    """Raise ConfigurationError if the Hub cannot have a repository of this name. Needs no network."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigurationError(f"--hub {name}: not a repository's name ({error}); give <user>/<model>") from error


def upload(directory: Path, name: str, *, private: bool) -> str:
    """Upload an export to the Hub's repository `name`, which is created if needed; return its address.

    A new repository is private if `private` is set, else as the owner's settings on the Hub say.

    Raises:
        ConfigurationError: the Hub cannot be reached, or refuses, or the repository is public and should be private.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository.repo_id).private:
            raise ConfigurationError(
                f"--private: {name} exists and is public; change that on the Hub, or leave --private out"
            )
        step = read_json(directory / TRAINING_FILE, 1 << 20)["step"]
        api.upload_folder(folder_path=directory, repo_id=repository.repo_id, commit_message=f"step {step}")
    except ConfigurationError:
        raise
    except Exception as error:  # no network, no token, a refusal: exceptions of several libraries
        reason = redacted(" ".join(str(error).split()))
        raise ConfigurationError(
            f"--hub {name}: not uploaded ({type(error).__name__}: {reason}); {directory} is complete: log in with "
            f"`hf auth login`, then rerun with --overwrite, or `hf upload {name} {directory}`"
        ) from error
    return str(repository)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice, and those of DeepSpeed, which it imports."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@torch.inference_mode()
def _compare(model: GPT2, tokenizer: Tokenizer, directory: Path) -> float:
    """Load the directory as its users will and compare it with the original; return the largest logit difference."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    their_tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    expected, found = tokenizer.encode(PROBE_TEXT).tolist(), their_tokenizer(PROBE_TEXT)["input_ids"]
    if expected != found or their_tokenizer.eos_token_id != tokenizer.end_of_text:
        raise ExportError(f"{directory}: transformers encodes a text as {found}, the run's tokenizer as {expected}")
    theirs = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, use_safetensors=True)
    length, generator = min(64, model.config.block_size), torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    logits = model.logits(ids)
    difference = (theirs(ids).logits - logits).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, logits.abs().max().item()):
        raise ExportError(f"{directory}: a logit of transformers' model differs by {difference:.2g} from the run's")
    return difference
