"""Text → tokens on disk → batches.

A source of documents and a tokenizer make a token directory (`prepare`, once); a `TokenDataset` maps one of its
splits, and `Batches` and `ValidationWindows` cut it into what a step sees. Nothing here imports torch.
"""

from data.batches import IGNORED_TARGET, Batch, Batches, Prefetcher, ValidationWindows
from data.dataset import TokenDataset
from data.errors import DataError
from data.manifest import Manifest, load_manifest, verify
from data.preparation import ensure_prepared, prepare, token_directory
from data.progress import Progress, progress_display
from data.sources import FileSource, HubSource, SampleSource, Source
from data.splits import SplitRule
from data.tokenizers import Tokenizer, TokenizerSpec, load_tokenizer

__all__ = [
    "IGNORED_TARGET",
    "Batch",
    "Batches",
    "DataError",
    "FileSource",
    "HubSource",
    "Manifest",
    "Prefetcher",
    "Progress",
    "SampleSource",
    "Source",
    "SplitRule",
    "TokenDataset",
    "Tokenizer",
    "TokenizerSpec",
    "ValidationWindows",
    "ensure_prepared",
    "load_manifest",
    "load_tokenizer",
    "prepare",
    "progress_display",
    "token_directory",
    "verify",
]
