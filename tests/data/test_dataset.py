from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import DataError, TokenDataset, load_manifest, verify
from tests.data.token_directory import write_token_directory


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    write_token_directory(tmp_path / "t", [np.arange(100), np.arange(100, 150)], [np.arange(20)], vocab_size=200)
    return tmp_path / "t"


def read_all(dataset: TokenDataset) -> np.ndarray:
    out = np.empty((1, dataset.tokens - 1), np.int64)
    targets = np.empty_like(out)
    dataset.read(np.array([0]), out, targets)
    return np.append(out[0], targets[0, -1])


def test_shards_are_read_as_one_stream(tokens: Path) -> None:
    train = TokenDataset(tokens, "train")
    assert train.tokens == 150
    assert np.array_equal(read_all(train), np.arange(150))
    assert np.array_equal(read_all(TokenDataset(tokens, "validation")), np.arange(20))


def test_shards_are_plain_numpy_files(tokens: Path) -> None:
    shard = np.load(tokens / "train-00001.npy", allow_pickle=False)
    assert shard.dtype == np.uint16
    assert np.array_equal(shard, np.arange(100, 150))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_are_stored_in_the_smallest_type_that_holds_the_vocabulary(
    tmp_path: Path, vocab_size: int, dtype: type
) -> None:
    ids = np.array([0, vocab_size - 1, 1])
    write_token_directory(tmp_path, [ids], vocab_size=vocab_size)
    assert np.load(tmp_path / "train-00000.npy").dtype == dtype
    assert np.array_equal(read_all(TokenDataset(tmp_path, "train")), ids)


@pytest.mark.parametrize(("place", "shard", "position"), [(0, 0, 0), (99, 0, 99), (100, 1, 0), (149, 1, 49)])
def test_a_token_outside_of_the_vocabulary_is_refused_by_shard_and_position(
    tmp_path: Path, place: int, shard: int, position: int
) -> None:
    ids = np.arange(150)
    ids[place] = 200
    write_token_directory(tmp_path, [ids[:100], ids[100:]], vocab_size=200)
    with pytest.raises(DataError, match=rf"train-0000{shard}.npy is damaged: token {position} is 200, but .* has 200"):
        read_all(TokenDataset(tmp_path, "train"))


def test_windows_outside_of_the_stream_are_refused(tokens: Path) -> None:
    dataset = TokenDataset(tokens, "train")
    out = np.empty((1, 10), np.int64)
    for start in (-1, 140, 10**12):
        with pytest.raises(IndexError, match="150 tokens"):
            dataset.read(np.array([start]), out, out.copy())


def test_an_unfinished_directory_is_named_with_the_command_that_finishes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path} holds no prepared tokens.*scripts/prepare_data.py"):
        load_manifest(tmp_path)


def test_an_unknown_split_is_refused(tokens: Path) -> None:
    with pytest.raises(DataError, match="'test' does not exist; choose one of train, validation"):
        TokenDataset(tokens, "test")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite_header(path: Path) -> None:
    path.write_bytes(b"x" * 128 + path.read_bytes()[128:])


def other_type(path: Path) -> None:
    np.save(path, np.arange(100, dtype=np.int16))


def directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_length(path: Path) -> None:
    np.save(path, np.arange(99, dtype=np.uint16))


def fifo_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "damage",
    [
        *(cut, lengthen, empty, overwrite_header, other_type, other_length, directory_instead, fifo_instead),
        *(device_instead, Path.unlink),
    ],
)
def test_a_shard_of_wrong_size_or_header_is_named_when_opened(tokens: Path, damage: object) -> None:
    damage(tokens / "train-00000.npy")  # type: ignore[operator]
    with pytest.raises(DataError, match=r"train-00000.npy .*(restore|prepare it again)"):
        TokenDataset(tokens, "train")


@pytest.mark.parametrize(("kept", "position"), [(60, 60), (0, 0)])
def test_a_shard_that_shrinks_while_it_is_read_is_named_with_the_position(
    tokens: Path, kept: int, position: int
) -> None:
    dataset = TokenDataset(tokens, "train")
    path = tokens / "train-00000.npy"
    os.truncate(path, path.stat().st_size - (100 - kept) * 2)
    with pytest.raises(DataError, match=rf"train-00000.npy: token {position} cannot be read: the file ends before it"):
        read_all(dataset)


def test_a_dataset_that_is_dropped_closes_its_shards(tokens: Path) -> None:
    before = os.listdir("/proc/self/fd")
    dataset = TokenDataset(tokens, "train")
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    del dataset
    assert len(os.listdir("/proc/self/fd")) == len(before)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_any_flipped_bit_of_any_shard_is_found_by_verify(tokens: Path, data: st.DataObject) -> None:
    path = tokens / data.draw(st.sampled_from(["train-00000.npy", "train-00001.npy", "validation-00000.npy"]))
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    damaged = bytearray(original)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{path.name} is damaged: its sha256"):
            verify(tokens)
    finally:
        path.write_bytes(original)
    assert verify(tokens).sha256 == load_manifest(tokens).sha256


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_a_manifest_with_any_changed_byte_is_refused_or_means_the_same(tokens: Path, data: st.DataObject) -> None:
    path = tokens / "manifest.json"
    original = path.read_bytes()
    before = load_manifest(tokens)
    damaged = bytearray(original)
    damaged[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(damaged)
        try:
            loaded = load_manifest(tokens)
        except DataError:
            return
        assert loaded == before  # only white space changed
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (fifo_instead, "cannot be read: it is a directory, a FIFO or a device"),
        (device_instead, "cannot be read: it is a directory, a FIFO or a device"),
        (directory_instead, "cannot be read: it is a directory, a FIFO or a device"),
        (lambda path: os.truncate(path, 1 << 40), "has 1,099,511,627,776 bytes; the limit is"),
        (lambda path: path.write_text("[" * 100_000), "nested more than 100 deep"),
        (lambda path: path.write_text("[" * 500 + "]" * 500), "nested more than 100 deep"),
        (lambda path: path.write_bytes(b'"\xff"'), "'utf-8' codec can't decode"),
        (lambda path: path.write_text("[]"), "has format 'list'"),
    ],
    ids=["fifo", "device", "directory", "a terabyte", "deep", "deep and whole", "not UTF-8", "a list"],
)
def test_a_file_that_is_not_a_manifest_is_named(tokens: Path, damage: object, message: str) -> None:
    path = tokens / "manifest.json"
    damage(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(tokens)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source", 5),
        ("split_rule", None),
        ("tokenizer.vocab_size", "200"),
        ("tokenizer.vocab_size", 2**40),
        ("tokenizer.end_of_text", None),
        ("splits.train", []),
        ("splits.validation", None),
        ("splits.train.shards.0.tokens", 100.5),
        ("splits.train.shards.0.documents", "many"),
        ("splits.train.shards.0.sha256", 7),
        ("splits.train.shards.0", None),
    ],
)
def test_a_manifest_with_a_value_of_another_type_is_named_with_the_key(tokens: Path, key: str, value: object) -> None:
    path = tokens / "manifest.json"
    content = json.loads(path.read_text())
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
    node = content
    for parent in parents:
        node = node[parent]
    node[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"manifest.json is damaged: {key}"):
        load_manifest(tokens)
    del node[last]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"manifest\.json (is damaged|was changed)"):
        load_manifest(tokens)


def test_a_manifest_cannot_name_files_outside_of_its_directory(tokens: Path) -> None:
    path = tokens / "manifest.json"
    content = json.loads(path.read_text())
    for name in ("../train-00000.npy", "/etc/passwd", "train-00000.npy/../x", "other.npy"):
        content["splits"]["train"]["shards"][0]["file"] = name
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match="is not a shard name"):
            load_manifest(tokens)


def test_the_hash_of_a_manifest_identifies_its_content(tmp_path: Path) -> None:
    same = [write_token_directory(tmp_path / name, [np.arange(50)]).sha256 for name in "ab"]
    other = write_token_directory(tmp_path / "c", [np.arange(1, 51)]).sha256
    assert same[0] == same[1] != other
    assert load_manifest(tmp_path / "a").sha256 == same[0]
