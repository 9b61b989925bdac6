"""Files that a new run needs, looked for before anything that takes long: a wrong path is refused at once.

What the ranks cannot use of them, they say later, all of them together.
"""

import os
from pathlib import Path

from data.preparation import refuse_unprepared
from training.config import ConfigurationError, RunConfig
from training.corpus import source_of, token_directory_of, tokenizer_of
from training.records import CONFIG_FILE


def refuse_absent_inputs(config: RunConfig) -> None:
    """Refuse a run whose checkpoint, weights or tokens do not exist, unless there may be a run that has begun with them.

    Raises:
        ConfigurationError: the path of `resume` or `model.init_from`.
        DataError: the corpus's file that does not exist, or the command that makes its tokens.
    """
    if _may_have_begun(config):
        return
    if config.resume not in ("auto", "never") and not os.path.exists(config.resume):
        raise ConfigurationError(
            f"resume: there is no directory {os.path.abspath(config.resume)}; give a checkpoint or a run directory"
        )
    init_from = config.model.init_from
    if init_from is not None and not os.path.isdir(init_from):
        raise ConfigurationError(
            f"model.init_from: there is no directory {os.path.abspath(init_from)}; give one with GPT-2 weights, as "
            "scripts/export.py and save_pretrained write them"
        )
    refuse_unprepared(token_directory_of(config), source_of(config), tokenizer_of(config))


def _may_have_begun(config: RunConfig) -> bool:
    """Whether there is a run of this name, whose hash is of the precision that the hardware has in the place of auto."""
    precisions = ("fp32", "bf16") if config.train.precision == "auto" else (config.train.precision,)
    trains = [config.train.model_copy(update={"precision": precision}) for precision in precisions]
    names = [config.model_copy(update={"train": train}).run_name for train in trains]
    return any(os.path.isfile(Path(config.output_dir, name, CONFIG_FILE)) for name in names)
