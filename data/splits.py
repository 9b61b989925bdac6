"""Which documents are for validation: a rule that does not depend on a run's seeds."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.errors import DataError

# Only the beginning of a document is hashed, so that its split is known before it is read whole.
_KEY_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class SplitRule:
    """How a corpus is divided into train and validation, document by document.

    rule "hash": a document is for validation if the hash of (seed, its text) is in the lowest `fraction` of all hashes.
        Equal documents fall into the same split, and adding documents moves none.
    rule "nanogpt": exactly the documents of nanoGPT's `data/openwebtext/prepare.py`, that is of
        `datasets.Dataset.train_test_split(test_size=fraction, seed=seed, shuffle=True)`; needs the number of documents
        in advance, so parquet files.
    """

    rule: str = "hash"
    fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("hash", "nanogpt"):
            raise DataError(f"data.validation.rule={self.rule!r} is unknown; choose hash or nanogpt")
        if not 0 < self.fraction < 1:
            raise DataError(f"data.validation.fraction={self.fraction} is not between 0 and 1; 0.0005 to 0.05 is usual")
        if self.seed < 0:
            raise DataError(f"data.validation.seed={self.seed} is negative; choose 0 or more")

    def describe(self) -> dict[str, Any]:
        return asdict(self)

    def is_validation(self, text: str) -> bool:
        """Apply the rule "hash" to one document."""
        key = text[:_KEY_CHARACTERS].encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(key, digest_size=8, key=self.seed.to_bytes(8, "little")).digest()
        return int.from_bytes(digest, "little") < self.fraction * 2**64

    def validation_rows(self, documents: int) -> np.ndarray:
        """Apply the rule "nanogpt": the sorted indices of the validation documents among `documents`, (n,) int64."""
        test_size = math.ceil(self.fraction * documents)
        if not 0 < test_size < documents:
            raise DataError(
                f"data.validation.fraction={self.fraction} of {documents} documents leaves one split empty; "
                "change the fraction or choose a larger corpus"
            )
        return np.sort(np.random.default_rng(self.seed).permutation(documents)[:test_size])
