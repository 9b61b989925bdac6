"""Where documents come from: the embedded sample, a dataset repository of the Hugging Face hub, or the user's files.

A source names its files and says how it is split; reading is the same for all (data/readers.py).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.documents import CUTTING
from data.errors import DataError
from data.files import canonical_json
from data.readers import suffix_of
from data.splits import SplitRule

_SAMPLE_DIRECTORY = Path(__file__).parent / "sample"
_SAMPLE_SPLIT = SplitRule("hash", 0.05)
_DEFAULT_SPLIT = SplitRule()
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Corpus:
    """A source's files, found: their paths in the order of the token stream, and their names for the manifest."""

    files: tuple[Path, ...]
    description: dict[str, Any]  # the manifest's `source`; nothing in it depends on the machine


class Source(ABC):
    """A corpus by description. `name` is that of the token directory, `text_column` of the column or key read."""

    name: str
    text_column: str
    split: SplitRule

    def refuse_absent(self) -> None:
        """Raise DataError if files that should lie on this machine do not. Needs no network."""
        return

    @abstractmethod
    def fetch(self, report: Callable[[str], None]) -> Corpus:
        """Find the files, downloading them if need be; `report` is told what takes time.

        Raises:
            DataError: there are none, or they cannot be had.
        """

    @property
    def overrides(self) -> str:
        """How the source is chosen on the command line of scripts/prepare_data.py."""
        return f"data={self.name}"

    @abstractmethod
    def request(self) -> dict[str, Any]:
        """What was asked for: two requests that may give different tokens differ. Needs neither files nor network."""


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
        revision: a commit (40 hexadecimal digits), so that the text cannot change; a tag or branch is resolved to the
            commit that it names when the files are fetched, and the manifest records that.
        files: which files, a glob in the repository such as "plain_text/*.parquet".
        local: a directory that already has these files in the repository's layout, used in place of the hub.
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
                f"data.local: there is no directory {root.absolute()}; give one that has the files of {self.repository}"
            )
        found = sorted(file for file in root.glob(self.files) if not file.is_dir())
        if not found:
            raise DataError(
                f"no file in {root} matches data.files={self.files!r} ({self.repository} at {revision}); look at the "
                "repository's list of files and correct the glob"
            )
        return found

    def _download(self, report: Callable[[str], None]) -> tuple[Path, str]:
        """The repository's files in the hub's own cache (HF_HOME), which resumes an interrupted download."""
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        report(f"fetching {self.files} of {self.repository} at {self.revision} into the Hugging Face cache")
        try:
            snapshot = huggingface_hub.snapshot_download(
                self.repository, repo_type="dataset", revision=self.revision, allow_patterns=[self.files]
            )
        except (HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"{self.repository} at revision {self.revision} cannot be fetched: {reason}; check data.repository, "
                "data.revision and, for a gated repository, HF_TOKEN"
            ) from error
        except (LocalEntryNotFoundError, OSError) as error:
            raise DataError(
                f"{self.repository} cannot be fetched: the Hugging Face hub is not reachable ({type(error).__name__}); "
                "check the network, or set data.local to a directory that has the repository's files"
            ) from error
        path = Path(snapshot)  # …/snapshots/<commit>
        return path, path.name if _COMMIT.fullmatch(path.name) else self.revision


@dataclass(frozen=True)
class FileSource(Source):
    """The user's own files by glob ("**" goes into directories): .txt, .jsonl, .jsonl.gz and .parquet, also mixed.

    A .txt file is cut into documents at <|endoftext|>, and at paragraph ends into pieces of about two thousand words;
    in the others a line or row is a document.
    """

    paths: Sequence[str]
    name: str = "text"
    text_column: str = "text"
    split: SplitRule = _DEFAULT_SPLIT

    def refuse_absent(self) -> None:
        _match(self.paths)

    def fetch(self, report: Callable[[str], None]) -> Corpus:
        files = _match(self.paths)
        root = os.path.commonpath([file.parent for file in files])
        return Corpus(
            tuple(files),
            {
                "kind": "files",
                "text_column": self.text_column,
                "cutting": CUTTING,
                "listing": _listing([Path(os.path.relpath(file, root)).as_posix() for file in files], files),
            },
        )

    @property
    def overrides(self) -> str:
        return f"data={self.name} 'data.paths=[{','.join(self.paths)}]'"

    def request(self) -> dict[str, Any]:
        return {
            "kind": "files",
            "paths": list(self.paths),
            "text_column": self.text_column,
            "cutting": CUTTING,
            "split": self.split.describe(),
        }


def _match(patterns: Sequence[str]) -> list[Path]:
    """The files of the globs, sorted by path, each once."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        matches = glob.glob(pattern, recursive=True)
        if not matches:
            absent = "no file matches" if glob.has_magic(pattern) else "there is no file"
            raise DataError(
                f"data.paths: {absent} {os.path.abspath(pattern)}; correct the path, and check that its directory may be read"
            )
        for match in matches:
            # A directory that a wildcard passes by is no mistake; one that is named, or looks like a file, is.
            if os.path.isdir(match) and glob.has_magic(pattern) and suffix_of(match) is None:
                continue
            found.setdefault(os.path.realpath(match), Path(match))
    if not found:
        raise DataError(f"data.paths={list(patterns)} matches directories alone; add the files' ending, such as *.txt")
    return sorted(found.values())


def _listing(names: Sequence[str], files: Sequence[Path]) -> dict[str, Any]:
    """How many files, how large, and a hash of all names and sizes."""
    try:
        sizes = [file.stat().st_size for file in files]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; restore it or remove it") from error
    digest = hashlib.sha256(canonical_json(list(zip(names, sizes, strict=True)))).hexdigest()
    return {"files": len(files), "bytes": sum(sizes), "sha256": digest}
