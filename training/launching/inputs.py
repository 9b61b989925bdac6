"""Check that the files of a new run exist before any slow import or start of ranks, so that a wrong path fails fast.

Whether the files are usable is checked later, by all ranks together.
"""

import os
from pathlib import Path

from data.preparation import refuse_unprepared
from training.config import ConfigurationError, ExternalConfig, RunConfig
from training.corpus import source_of, token_directory_of, tokenizer_of
from training.records import CONFIG_FILE


def refuse_absent_inputs(config: RunConfig) -> None:
    """Refuse a run whose optimizer, model, checkpoint, weights or tokens do not exist, unless it may have started before.

    Raises ConfigurationError for `optimizer.factory`, `model.architecture` and the paths in `resume` and `model.init_from`,
    DataError for the corpus or its tokens.
    """
    if isinstance(config.optimizer, ExternalConfig):
        from training import external  # imports torch

        external.load(config.optimizer)
    if not config.model.is_gpt2:
        from training import architectures

        architectures.load(config.model)
    if _may_have_started(config):
        return
    if config.resume not in ("auto", "never") and not os.path.exists(config.resume):
        raise ConfigurationError(
            f"resume={os.path.abspath(config.resume)}: no such directory; give a checkpoint or a run directory"
        )
    init_from = config.model.init_from
    if init_from is not None and not os.path.isdir(init_from):
        raise ConfigurationError(
            f"model.init_from={os.path.abspath(init_from)}: no such directory; give one with GPT-2 weights, as "
            "scripts/export.py and save_pretrained write them"
        )
    refuse_unprepared(token_directory_of(config), source_of(config), tokenizer_of(config))


def _may_have_started(config: RunConfig) -> bool:
    """Return whether a run of this name exists. Its hash depends on what train.precision=auto became."""
    precisions = ("fp32", "bf16") if config.train.precision == "auto" else (config.train.precision,)
    trains = [config.train.model_copy(update={"precision": precision}) for precision in precisions]
    names = [config.model_copy(update={"train": train}).run_name for train in trains]
    return any(os.path.isfile(Path(config.output_dir, name, CONFIG_FILE)) for name in names)
