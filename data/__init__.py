"""Text → tokens on disk → batches.

A source of documents and a tokenizer make a token directory (`prepare`, once); a `TokenDataset` maps one of its
splits, and `Batches` and `ValidationWindows` cut it into what a step sees. Nothing here imports torch.
"""

import importlib
from typing import Any

# Where each public name lies. It is imported when it is first used: `data.errors` and `data.files` serve commands that
# answer before numpy could be imported.
_MODULES = {
    "IGNORED_TARGET": "batches",
    "Batch": "batches",
    "Batches": "batches",
    "DataError": "errors",
    "FileSource": "sources",
    "HubSource": "sources",
    "Manifest": "manifest",
    "Prefetcher": "batches",
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
