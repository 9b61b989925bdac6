"""The corpus of a configuration: its source, its tokenizer, and the directory of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.manifest import Manifest, load_manifest
from data.preparation import ensure_prepared, token_directory
from data.progress import progress_display
from data.sources import FileSource, HubSource, SampleSource, Source
from data.splits import SplitRule
from data.tokenizers import TokenizerSpec
from training.config import FilesDataConfig, HubDataConfig, RunConfig, SampleDataConfig

if TYPE_CHECKING:  # imports torch, for which a refused command line should not wait
    from training.distributed import Distributed


def source_of(config: RunConfig) -> Source:
    """Return the source that the `data` section describes."""
    match config.data:
        case SampleDataConfig():
            return SampleSource()
        case HubDataConfig() as data:
            return HubSource(
                name=data.name,
                repository=data.repository,
                revision=data.revision,
                files=data.files,
                text_column=data.text_column,
                split=SplitRule(**data.validation.model_dump()),
                local=None if data.local is None else Path(data.local),
            )
        case FilesDataConfig() as data:
            split = SplitRule(**data.validation.model_dump())
            return FileSource(paths=data.paths, name=data.name, text_column=data.text_column, split=split)


def tokenizer_of(config: RunConfig) -> TokenizerSpec:
    size = config.tokenizer.vocab_size if config.tokenizer.name == "bpe" else None
    return TokenizerSpec(config.tokenizer.name, size)


def token_directory_of(config: RunConfig) -> Path:
    """Return the directory of the corpus's tokens, which need not exist: <data.directory>/<source>-<tokenizer>."""
    return token_directory(config.data.directory, source_of(config), tokenizer_of(config))


def open_corpus(config: RunConfig, distributed: Distributed) -> tuple[Path, Manifest]:
    """Open the prepared tokens. On first use rank 0 prepares the embedded sample while the others wait.

    Raises:
        DataError: on every rank, if the tokens are missing (the message has the command to prepare them) or damaged.
        ConfigurationError: on every rank, if the ranks have different tokens.
    """
    distributed.on_main(
        lambda: ensure_prepared(
            config.data.directory, source_of(config), tokenizer_of(config), progress=progress_display()
        )
    )
    directory = token_directory_of(config)
    manifest = distributed.on_all(lambda: load_manifest(directory))
    distributed.agree({"tokens": manifest.sha256[:12]}, f"copy the tokens of rank 0 to {directory} on every node")
    return directory, manifest
