"""Text → tokens on disk → batches.

`prepare` turns a source of documents into a token directory, once. A `TokenDataset` reads one of its splits; `Batches`
and `ValidationWindows` cut the split into batches. Nothing here imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

# ruff: noqa: F401 (for type checkers only)
if TYPE_CHECKING:
    from data.batches import IGNORED_TARGET, Batch, Batches, ValidationWindows
    from data.dataset import TokenDataset
    from data.errors import DataError
    from data.manifest import Manifest, load_manifest, verify
    from data.preparation import ensure_prepared, prepare, token_directory
    from data.progress import Progress, progress_display
    from data.sources import FileSource, HubSource, SampleSource, Source
    from data.splits import SplitRule
    from data.tokenizers import Tokenizer, TokenizerSpec, load_tokenizer

# Modules are imported on first use, so that commands that only need `data.errors` and `data.files` start without numpy.
_MODULES = {
    "IGNORED_TARGET": "batches",
    "Batch": "batches",
    "Batches": "batches",
    "DataError": "errors",
    "FileSource": "sources",
    "HubSource": "sources",
    "Manifest": "manifest",
    "Progress": "progress",
    "SampleSource": "sources",
    "Source": "sources",
    "SplitRule": "splits",
    "TokenDataset": "dataset",
    "Tokenizer": "tokenizers",
    "TokenizerSpec": "tokenizers",
    "ValidationWindows": "batches",
    "ensure_prepared": "preparation",
    "load_manifest": "manifest",
    "load_tokenizer": "tokenizers",
    "prepare": "preparation",
    "progress_display": "progress",
    "token_directory": "preparation",
    "verify": "manifest",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"data.{_MODULES[name]}"), name)
