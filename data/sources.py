"""Sources of documents: the embedded sample, a dataset repository on the Hugging Face hub, or the user's files.

A source finds its files and has a split rule; data/readers.py reads the files of all sources.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from data.documents import CUTTING
from data.errors import DataError
from data.files import canonical_json, why_not_written
from data.readers import suffix_of
from data.splits import SplitRule

_SAMPLE_DIRECTORY = Path(__file__).parent / "sample"
_SAMPLE_SPLIT = SplitRule("hash", 0.05)
_DEFAULT_SPLIT = SplitRule()
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD_NAME = re.compile(r"(.*)-\d{5}-of-(\d{5})(.*)")


@dataclass(frozen=True)
class Corpus:
    """A source's files."""

    files: tuple[Path, ...]  # in the order of the token stream
    description: dict[str, Any]  # the manifest's `source`; independent of the machine


class Source(ABC):
    """A corpus. `name` names its token directory, `text_column` the column or key with the text."""

    name: str
    text_column: str
    split: SplitRule

    def refuse_absent(self) -> None:
        """Raise DataError if files that should be on this machine are missing. Needs no network."""
        return

    @abstractmethod
    def fetch(self, report: Callable[[str], None]) -> Corpus:
        """Find the files, downloading them if necessary; `report` is called before slow work.

        Raises:
            DataError: there are no files, some of a numbered series are missing, or they cannot be downloaded.
        """

    def listing(self) -> dict[str, Any] | None:
        """The manifest's listing of the files as they are now; None if they are not on this machine. Needs no network."""
        with suppress(DataError, OSError):
            return self.fetch(lambda _: None).description.get("listing")
        return None

    @abstractmethod
    def request(self) -> dict[str, Any]:
        """Everything that determines the tokens, without reading files or the network."""


@dataclass(frozen=True)
class SampleSource(Source):
    """The public-domain corpus in data/sample: Austen's novels, Shakespeare's works, State of the Union addresses.

    About 21 MB, 5 million tokens of GPT-2's vocabulary.
    """

    name: str = "sample"
    split: SplitRule = _SAMPLE_SPLIT
    text_column: str = field(default="text", init=False)

    def fetch(self, report: Callable[[str], None]) -> Corpus:
        files = tuple(sorted(_SAMPLE_DIRECTORY.glob("*.txt.xz")))
        if not files:
            raise DataError(f"{_SAMPLE_DIRECTORY} holds no *.txt.xz; restore it from the repository")
        hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        return Corpus(files, {"kind": "sample", "files": hashes, "cutting": CUTTING})

    def request(self) -> dict[str, Any]:
        return {"kind": "sample", "cutting": CUTTING, "split": self.split.describe()}


@dataclass(frozen=True)
class HubSource(Source):
    """Parquet files of a dataset repository on the Hugging Face hub, at one revision.

    Args:
        repository: such as "Skylion007/openwebtext".
        revision: a commit (40 hexadecimal digits), so that the text cannot change. A tag or branch is resolved to its
            commit when the files are downloaded, and the manifest records the commit.
        files: a glob in the repository, such as "plain_text/*.parquet".
        local: a directory that has these files in the repository's layout, used instead of the hub.
    """

    name: str
    repository: str
    revision: str
    files: str
    text_column: str = "text"
    split: SplitRule = _DEFAULT_SPLIT
    local: Path | None = None

    def refuse_absent(self) -> None:
        if self.local is not None:
            self._files_in(self.local, self.revision)

    def listing(self) -> dict[str, Any] | None:
        return None if self.local is None else super().listing()

    def fetch(self, report: Callable[[str], None]) -> Corpus:
        root, revision = (self.local, self.revision) if self.local is not None else self._download(report)
        found = self._files_in(root, revision)
        description = {
            "kind": "hub",
            "repository": self.repository,
            "revision": revision,
            "files": self.files,
            "text_column": self.text_column,
            "listing": _listing([file.relative_to(root).as_posix() for file in found], found),
        }
        return Corpus(tuple(found), description)

    def request(self) -> dict[str, Any]:
        return {
            "kind": "hub",
            "repository": self.repository,
            "revision": self.revision,
            "files": self.files,
            "text_column": self.text_column,
            "split": self.split.describe(),
        }

    def _files_in(self, root: Path, revision: str) -> list[Path]:
        """The repository's files in a directory, sorted by path."""
        if not root.is_dir():
            raise DataError(
                f"data.local={root.absolute()}: no such directory; give one that holds the files of {self.repository}"
            )
        found = sorted(file for file in root.glob(self.files) if not file.is_dir())
        if not found:
            raise DataError(
                f"no file in {root} matches data.files={self.files!r} ({self.repository} at {revision}); compare the "
                "glob with the repository's list of files"
            )
        _refuse_partial(found, PurePosixPath(self.files).name)
        return found

    def _download(self, report: Callable[[str], None]) -> tuple[Path, str]:
        """The repository's files in the hub's own cache (HF_HOME), which resumes an interrupted download."""
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        report(f"downloading {self.files} of {self.repository} at {self.revision} into the Hugging Face cache")
        try:
            snapshot = huggingface_hub.snapshot_download(
                self.repository, repo_type="dataset", revision=self.revision, allow_patterns=[self.files]
            )
        except (HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"{self.repository} at revision {self.revision} cannot be downloaded: {reason}; check data.repository, "
                "data.revision and, for a gated repository, HF_TOKEN"
            ) from error
        except Exception as error:  # the HTTP clients' errors have no type in common
            if isinstance(error, OSError) and (remedy := why_not_written(error)[1]):
                where = error.filename or "the Hugging Face cache (HF_HOME)"
                raise DataError(
                    f"{self.repository}: {where} cannot be written: {error.strerror or error}; {remedy}, and rerun"
                ) from error
            raise DataError(
                f"{self.repository} cannot be downloaded: the Hugging Face hub is not reachable ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); check the network, or set data.local to a directory that has the "
                "repository's files"
            ) from error
        path = Path(snapshot)  # …/snapshots/<commit>
        return path, path.name if _COMMIT.fullmatch(path.name) else self.revision


def _refuse_partial(files: Sequence[Path], pattern: str) -> None:
    """Refuse a copy that lacks some of the shards <name>-NNNNN-of-MMMMM, as an interrupted download does.

    Args:
        pattern: the glob of the names, which may ask for some of the shards.
    """
    matches = ((file.parent, _SHARD_NAME.fullmatch(file.name)) for file in files)
    series = Counter((directory, match[1], match[2], match[3]) for directory, match in matches if match)
    for (directory, start, total, end), found in series.items():
        siblings = (f"{start}-{number:05d}-of-{total}{end}" for number in range(int(total)))
        expected = sum(fnmatchcase(name, pattern) for name in siblings)
        if found < expected:
            raise DataError(
                f"{directory} lacks {expected - found} of the {expected} files {start}-*-of-{total}{end}; copy them there, "
                "or rerun where the hub is reachable to download them; to use only some files, narrow data.files"
            )


@dataclass(frozen=True)
class FileSource(Source):
    """The user's own files by glob ("**" descends into directories): .txt, .jsonl, .jsonl.gz and .parquet, also mixed.

    A .txt file is cut into documents at <|endoftext|> and, at the ends of paragraphs, into pieces of about two thousand
    words. In the other formats each line or row is a document.
    """

    paths: Sequence[str]
    name: str = "text"
    text_column: str = "text"
    split: SplitRule = _DEFAULT_SPLIT

    def refuse_absent(self) -> None:
        _match(self.paths)

    def fetch(self, report: Callable[[str], None]) -> Corpus:
        files = _match(self.paths)
        absolute = [Path(os.path.abspath(file)) for file in files]
        root = os.path.commonpath([file.parent for file in absolute])
        return Corpus(
            tuple(files),
            {
                "kind": "files",
                "text_column": self.text_column,
                "cutting": CUTTING,
                "listing": _listing([file.relative_to(root).as_posix() for file in absolute], files),
            },
        )

    def request(self) -> dict[str, Any]:
        return {
            "kind": "files",
            "paths": list(self.paths),
            "text_column": self.text_column,
            "cutting": CUTTING,
            "split": self.split.describe(),
        }


def _match(patterns: Sequence[str]) -> list[Path]:
    """The files that match the globs, sorted by absolute path. Of several names of one file, the first is kept."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            absent = "no file matches" if glob.has_magic(pattern) else "there is no file"
            raise DataError(
                f"data.paths: {absent} {os.path.abspath(pattern)}; correct the path, and check that its directory is readable"
            )
        for match in matches:
            # A directory that a wildcard happens to match is skipped; one that is named, or looks like a file, is a mistake.
            if os.path.isdir(match) and glob.has_magic(pattern) and suffix_of(match) is None:
                continue
            found.setdefault(os.path.realpath(match), Path(match))
    if not found:
        raise DataError(f"data.paths={list(patterns)} matches only directories; add a file pattern, such as *.txt")
    return sorted(found.values(), key=lambda file: Path(os.path.abspath(file)))


def _listing(names: Sequence[str], files: Sequence[Path]) -> dict[str, Any]:
    """The number of files, their total size, and a hash of all names and sizes."""
    try:
        sizes = [file.stat().st_size for file in files]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; restore or remove it") from error
    digest = hashlib.sha256(canonical_json(list(zip(names, sizes, strict=True)))).hexdigest()
    return {"files": len(files), "bytes": sum(sizes), "sha256": digest}
