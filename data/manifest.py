"""The manifest of a token directory: where its tokens come from, and the size and hash of each shard.

    tokens/<source>-<tokenizer>/manifest.json           written last: a directory without it is unfinished
    tokens/<source>-<tokenizer>/tokenizer.json          the trained tokenizer (only for tokenizer=bpe)
    tokens/<source>-<tokenizer>/train-00000.npy         one-dimensional uint16 or uint32 arrays in NumPy's own format
    tokens/<source>-<tokenizer>/validation-00000.npy

The shards of a split, in manifest order, form one stream of tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data.errors import DataError
from data.files import canonical_json, open_regular, problem, read_json, write_json

MANIFEST_FILE = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation")

# A manifest only names files in its own directory.
_SHARD_NAME = re.compile(r"(train|validation)-\d{5,}\.npy")
_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Shard:
    file: str
    tokens: int
    documents: int  # documents that end in this shard
    sha256: str  # of the whole file


@dataclass(frozen=True)
class Split:
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


@dataclass(frozen=True)
class TokenizerInfo:
    name: str  # "gpt2" or "bpe"
    vocab_size: int
    end_of_text: int  # the id that ends each document
    sha256: str  # of the tokenizer's canonical form


@dataclass(frozen=True)
class Manifest:
    """The contents of a token directory.

    `source` and `split_rule` describe the corpus and its split without anything that depends on the machine (absolute
    paths, times), so preparing the same text with the same tokenizer gives the same `sha256`.
    """

    source: dict[str, Any]
    split_rule: dict[str, Any]
    tokenizer: TokenizerInfo
    splits: dict[str, Split]  # "train" and "validation"

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.tokenizer.vocab_size)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(canonical_json(self._content())).hexdigest()

    def write(self, directory: Path) -> None:
        write_json(directory / MANIFEST_FILE, {**self._content(), "sha256": self.sha256})

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "source": self.source,
            "split_rule": self.split_rule,
            "tokenizer": asdict(self.tokenizer),
            "dtype": self.dtype.name,
            "splits": {
                name: {
                    "tokens": split.tokens,
                    "documents": split.documents,
                    "shards": [asdict(shard) for shard in split.shards],
                }
                for name, split in self.splits.items()
            },
        }


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Little-endian uint16 if every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class _Read(BaseModel):
    """The schema of manifest.json."""

    model_config = ConfigDict(strict=True)


class _ReadShard(_Read):
    file: str
    tokens: Annotated[int, Field(gt=0)]
    documents: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _ReadSplit(_Read):
    shards: list[_ReadShard]


class _ReadTokenizer(_Read):
    name: str
    vocab_size: Annotated[int, Field(gt=0, le=1 << 32)]  # ids are uint32
    end_of_text: Annotated[int, Field(ge=0)]
    sha256: str


class _ReadManifest(_Read):
    source: dict[str, Any]
    split_rule: dict[str, Any]
    tokenizer: _ReadTokenizer
    splits: dict[str, _ReadSplit]


def load_manifest(directory: str | Path) -> Manifest:
    """Read and check `directory/manifest.json`.

    Raises:
        DataError: it is missing, has another format, or does not match its own hash.
    """
    path = Path(directory) / MANIFEST_FILE
    remedy = f"remove {path.parent} and prepare it again with scripts/prepare_data.py"
    try:
        content = read_json(path, _MANIFEST_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"{path.parent} holds no prepared tokens: it has no {MANIFEST_FILE}; "
            "run scripts/prepare_data.py, which also resumes an interrupted preparation"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: not JSON ({problem(error)}); {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        given = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path} has format {given!r}, but this version reads format {FORMAT}; {remedy}")
    try:
        manifest = _parse(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {problem(error)}; {remedy}") from error
    if content.get("sha256") != manifest.sha256:
        raise DataError(
            f"{path} was changed after it was written: its content has sha256 {manifest.sha256}, but it records "
            f"{content.get('sha256')}; {remedy}"
        )
    return manifest


def _parse(content: dict[str, Any]) -> Manifest:
    read = _ReadManifest.model_validate(content)
    tokenizer = TokenizerInfo(**read.tokenizer.model_dump())
    if tokenizer.end_of_text >= tokenizer.vocab_size:
        raise ValueError(f"end_of_text {tokenizer.end_of_text} is not in a vocabulary of {tokenizer.vocab_size}")
    if missing := [name for name in SPLITS if name not in read.splits]:
        raise ValueError(f"splits.{missing[0]} is missing")
    splits = {name: Split(tuple(Shard(**shard.model_dump()) for shard in read.splits[name].shards)) for name in SPLITS}
    for shard in (shard for split in splits.values() for shard in split.shards):
        if not _SHARD_NAME.fullmatch(shard.file):
            raise ValueError(f"{shard.file!r} is not a shard name")
    return Manifest(read.source, read.split_rule, tokenizer, splits)


def verify(directory: str | Path, report: Callable[[str], None] | None = None) -> Manifest:
    """Read every shard and compare it with its recorded sha256; `report` is called with each file name.

    Raises:
        DataError: a file is missing or differs; names the first.
    """
    directory = Path(directory)
    manifest = load_manifest(directory)
    for split in manifest.splits.values():
        for shard in split.shards:
            path = directory / shard.file
            if report is not None:
                report(shard.file)
            try:
                with open_regular(path) as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}; {shard_remedy(directory)}") from error
            if found != shard.sha256:
                raise DataError(
                    f"{path} is damaged: its sha256 is {found}, but the manifest has {shard.sha256}; "
                    f"{shard_remedy(directory)}"
                )
    return manifest


def shard_remedy(directory: Path) -> str:
    return f"restore the file from a copy, or remove {directory} and prepare it again with scripts/prepare_data.py"
