"""Text → tokens on disk → batches.

A source of documents and a tokenizer make a token directory (`prepare`, once); a `TokenDataset` maps one of its
splits, and `Batches` and `ValidationWindows` cut it into what a step sees. Nothing here imports torch.
"""

from data.batches import IGNORED_TARGET, Batch, Batches, Prefetcher, ValidationWindows
from data.dataset import TokenDataset
from data.errors import DataError
from data.manifest import Manifest, load_manifest, verify

__all__ = [
    "IGNORED_TARGET",
    "Batch",
    "Batches",
    "DataError",
    "Manifest",
    "Prefetcher",
    "TokenDataset",
    "ValidationWindows",
    "load_manifest",
    "verify",
]
