from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from data import DataError, FileSource, HubSource, SampleSource
from tests.data.corpora import write_parquet

COMMIT = "b4325f019c648b1641a1784748667e8b74e5e064"


def fetch(source: Any) -> Any:
    return source.fetch(lambda _: None)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")


def test_files_are_those_of_the_globs_sorted_and_once(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("b.txt", "a.txt", "deep/er/c.txt", "d.jsonl", "e.md")))
    (tmp_path / "deep" / "er" / "again.txt").symlink_to(tmp_path / "a.txt")
    source = FileSource(paths=[f"{tmp_path}/*.txt", f"{tmp_path}/**/*.txt", f"{tmp_path}/*.jsonl"])
    assert [path.relative_to(tmp_path).as_posix() for path in fetch(source).files] == [
        "a.txt",
        "b.txt",
        "d.jsonl",
        "deep/er/c.txt",
    ]


def test_a_corpus_is_described_by_its_files_and_not_by_where_they_are(tmp_path: Path) -> None:
    for root in ("one", "two"):
        touch(tmp_path / root / "a.txt", tmp_path / root / "sub" / "b.txt")
    one, two = (fetch(FileSource(paths=[f"{tmp_path}/{root}/**/*.txt"])).description for root in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "a.txt").write_text("longer text")
    assert fetch(FileSource(paths=[f"{tmp_path}/two/**/*.txt"])).description != one


def test_a_corpus_is_the_same_however_its_paths_are_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(*(tmp_path / name for name in ("b/x.txt", "c/y.txt", "a.txt")))
    monkeypatch.chdir(tmp_path / "b")
    names = ["a.txt", "b/x.txt", "c/y.txt"]
    absolute = [f"{tmp_path}/{name}" for name in names]
    expected = fetch(FileSource(paths=absolute))
    assert [path.relative_to(tmp_path).as_posix() for path in expected.files] == names
    for paths in (
        ["x.txt", "../c/y.txt", "../a.txt"],
        ["x.txt", *absolute[::2]],  # absolute and relative
        ["../b/x.txt", "../b/../c/y.txt", "../a.txt"],
    ):
        corpus = fetch(FileSource(paths=paths))
        assert [path.resolve() for path in corpus.files] == [path.resolve() for path in expected.files]
        assert corpus.description == expected.description


def test_the_name_that_is_kept_of_two_does_not_depend_on_the_order_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "b.txt")
    for name in ("a.txt", "c.txt"):
        (tmp_path / name).symlink_to(tmp_path / "b.txt")
    for order in itertools.permutations([f"{tmp_path}/{name}.txt" for name in "abc"]):
        monkeypatch.setattr("data.sources.glob.glob", lambda *_, order=order, **__: list(order))
        assert fetch(FileSource(paths=[f"{tmp_path}/*.txt"])).files == (tmp_path / "a.txt",)


def test_a_glob_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data.paths: no file matches {tmp_path}/\*\.txt;"):
        fetch(FileSource(paths=[f"{tmp_path}/*.txt"]))


def test_globs_that_match_only_directories_are_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match=r"matches only directories; add a file pattern"):
        fetch(FileSource(paths=[f"{tmp_path}/*"]))


def test_directories_between_the_files_are_passed_by_and_those_named_like_files_are_not(tmp_path: Path) -> None:
    touch(tmp_path / "sub" / "a.txt")
    assert len(fetch(FileSource(paths=[f"{tmp_path}/**"])).files) == 1
    (tmp_path / "b.txt").mkdir()
    assert len(fetch(FileSource(paths=[f"{tmp_path}/**"])).files) == 2, "left to the reader, which refuses it"


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "missing")
    with pytest.raises(DataError, match=r"a\.txt cannot be read"):
        fetch(FileSource(paths=[f"{tmp_path}/*.txt"]))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.txt")
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert fetch(FileSource(paths=["~/*.txt"])).files == (tmp_path / "a.txt",)


def openwebtext(**changes: Any) -> HubSource:
    arguments: dict[str, Any] = {
        "name": "openwebtext",
        "repository": "Skylion007/openwebtext",
        "revision": COMMIT,
        "files": "plain_text/*.parquet",
    }
    return HubSource(**{**arguments, **changes})


def test_a_repository_is_fetched_at_its_revision_and_the_commit_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / COMMIT
    for number in (1, 0):
        write_parquet(snapshot / "plain_text" / f"train-{number:05d}-of-00002.parquet", ["a"])
    touch(snapshot / "README.md")
    asked: list[Any] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return os.fspath(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    corpus = fetch(openwebtext(revision="main"))
    assert asked == [
        (
            "Skylion007/openwebtext",
            {"repo_type": "dataset", "revision": "main", "allow_patterns": ["plain_text/*.parquet"]},
        )
    ]
    assert [path.name for path in corpus.files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert corpus.description["revision"] == COMMIT
    assert corpus.description == fetch(openwebtext(local=snapshot)).description, "a local copy is the same corpus"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("nothing here"), r"hub is not reachable .*data\.local"),
        (ConnectionError("no route"), r"hub is not reachable .*data\.local"),
        (httpx2.ConnectError("no route"), r"hub is not reachable \(ConnectError: no route\).*data\.local"),
    ],
)
def test_a_hub_out_of_reach_is_one_clear_error(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=rf"Skylion007/openwebtext cannot be downloaded.*{message}"):
        fetch(openwebtext())


def test_a_download_onto_a_full_disk_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/hub/blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=r"/cache/hub/blob cannot be written: No space left on device; free space"):
        fetch(openwebtext())


def test_an_unknown_revision_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    def fail(*_: Any, **__: Any) -> str:
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub/api"))
        raise RevisionNotFoundError("404: Revision Not Found\nmore", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=rf"openwebtext at revision {COMMIT} cannot be downloaded: .*data\.revision"):
        fetch(openwebtext())


def test_a_repository_without_such_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"matches data\.files='plain_text/\*\.parquet' \(Skylion007/openwebtext"):
        fetch(openwebtext(local=tmp_path))


def test_a_repository_with_missing_shards_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub out of reach, snapshot_download returns what an interrupted download left."""
    shards = [tmp_path / "plain_text" / f"train-{number:05d}-of-00080.parquet" for number in range(80)]
    touch(*shards[3:5], tmp_path / "plain_text" / "test-00000-of-00001.parquet")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: os.fspath(tmp_path))
    message = r"plain_text lacks 78 of the 80 files train-\*-of-00080\.parquet; copy .*data\.files"
    for source in (openwebtext(), openwebtext(local=tmp_path)):
        with pytest.raises(DataError, match=message):
            fetch(source)
    with pytest.raises(DataError, match=message):
        openwebtext(local=tmp_path).refuse_absent()
    assert len(fetch(openwebtext(local=tmp_path, files="plain_text/train-0000[34]-*")).files) == 2, "as asked for"
    touch(*shards)
    assert len(fetch(openwebtext(local=tmp_path)).files) == 81


def test_the_sample_is_described_by_the_hashes_of_its_files() -> None:
    description = fetch(SampleSource()).description
    assert sorted(description["files"]) == ["austen.txt.xz", "shakespeare.txt.xz", "sotu.txt.xz"]


def test_requests_that_may_give_different_tokens_differ() -> None:
    assert openwebtext().request() != openwebtext(revision="main").request()
    assert openwebtext(local=Path("/data")).request() == openwebtext().request()
    assert FileSource(paths=["a"]).request() != FileSource(paths=["b"]).request()
