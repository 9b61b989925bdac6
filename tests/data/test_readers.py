from __future__ import annotations

import gzip
import itertools
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import DataError, readers
from data.documents import cut_documents
from data.readers import read_documents, segments
from tests.data.corpora import texts, write_json_lines, write_parquet, write_text


def read(path: Path, column: str = "text", limit: int = 1 << 30) -> list[str]:
    parts = segments(path, column, limit)
    return [text for part in parts for text in read_documents(part, column, lambda _: None) if text is not None]


@pytest.mark.parametrize("limit", [200, 1000, 5000, 1 << 30])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_the_segments_of_a_file_hold_its_documents_once_and_in_order(tmp_path: Path, name: str, limit: int) -> None:
    documents = [*texts(300), "", "one with \u2028 \r\n and \n line ends, \0 and 🙂", "x" * 5000]
    path = tmp_path / name
    write_parquet(path, documents, 17) if name.endswith("parquet") else write_json_lines(path, documents)
    assert read(path, limit=limit) == documents


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    text=st.lists(st.sampled_from(["word ", "é", "中", "🙂", "\n", "\n\n", "\r\n", "\r\n\r\n", "\r"]), min_size=1).map(
        "".join
    ),
    limit=st.integers(1, 50),
)
def test_the_segments_of_a_text_hold_it_once_and_cut_no_character(tmp_path: Path, text: str, limit: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    parts = segments(path, "text", limit)
    assert parts[0].start == 0
    assert parts[-1].stop == len(text.encode())
    assert all(one.stop == other.start for one, other in itertools.pairwise(parts))
    words = "".join("".join(read(path, limit=limit)).split())
    assert words == "".join(text.split())


def test_a_text_is_segmented_at_paragraphs(tmp_path: Path) -> None:
    paragraphs = texts(200)
    path = write_text(tmp_path / "a.txt", paragraphs)
    content = path.read_bytes()
    parts = segments(path, "text", 1000)
    assert len(parts) > 10
    assert all(content[part.start - 2 : part.start] == b"\n\n" for part in parts[1:])


@pytest.mark.parametrize("limit", range(20, 60))
def test_a_text_of_one_line_is_segmented_at_separators_else_at_words(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "a.txt"
    documents = [f"document {number} 中文" for number in range(20)]
    path.write_text("<|endoftext|>".join(documents))
    assert len(segments(path, "text", limit)) > 5
    assert read(path, limit=limit) == documents, "none is cut"
    path.write_text(" ".join(documents))
    assert len(segments(path, "text", limit)) > 5
    assert "".join(read(path, limit=limit)) == " ".join(documents)
    assert all(text.endswith(" ") for text in read(path, limit=limit)[:-1])


def test_line_ends_and_byte_order_mark_of_other_systems_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\rthree")
    assert read(path) == ["one\n\ntwo\nthree"]
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert read(lines) == ["one", "two"]


def test_text_is_cut_into_documents_as_a_whole_however_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(texts(3000))
    path = write_text(tmp_path / "a.txt", [text])
    packed = tmp_path / "a.txt.xz"
    packed.write_bytes(lzma.compress(text.encode()))
    monkeypatch.setattr(readers, "_CHUNK_BYTES", 1001)  # cuts characters
    assert read(path) == read(packed) == list(cut_documents([text]))


@pytest.mark.parametrize("padding", [0, 4, 1000])
def test_every_stream_of_an_xz_file_is_read_also_after_padding(
    tmp_path: Path, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CHUNK_BYTES", 61)
    path = tmp_path / "a.txt.xz"
    path.write_bytes(
        b"".join(lzma.compress(text.encode()) + bytes(padding) for text in ("one ", "", "中" * 1000, " end"))
    )
    assert read(path) == ["one " + "中" * 1000 + " end"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.xz"])
def test_progress_adds_up_to_about_the_size(tmp_path: Path, name: str) -> None:
    path, documents = tmp_path / name, texts(3000)
    if name.endswith("parquet"):
        write_parquet(path, documents)
    elif "json" in name:
        write_json_lines(path, documents)
    else:
        content = "\n\n".join(documents).encode()
        path.write_bytes(lzma.compress(content) if name.endswith("xz") else content)
    moved: list[int] = []
    (part,) = [*segments(path, "text", 1 << 30)][:1]
    for _ in read_documents(part, "text", moved.append):
        pass
    assert 0.9 * part.bytes <= sum(moved) <= 1.35 * part.bytes


def test_a_row_without_text_keeps_its_number(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", None, "c"])
    (part,) = segments(path, "text", 1)
    assert list(read_documents(part, "text", lambda _: None)) == ["a", None, "c"]


# Faulty files: how to make each, and what the message must say in addition to the file's name.

Damage = Callable[[Path], None]


def write(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content) and None


def truncated(make: Callable[[Path], Path], keep: float) -> Damage:
    def damage(path: Path) -> None:
        make(path)
        os.truncate(path, int(path.stat().st_size * keep))

    return damage


def parquet_of(kind: pa.DataType, values: list[object]) -> Damage:
    return lambda path: pq.write_table(pa.table({"text": pa.array(values, kind)}), path)


BAD = {
    "empty.txt": (write(b""), "is empty; remove it"),
    "empty.parquet": (write(b""), "is empty; remove it"),
    "latin1.txt": (write("caf\u00e9 au lait".encode("latin1")), "is not UTF-8: byte 0xe9 at offset 3 .*iconv"),
    "cut.txt": (write("中".encode()[:2]), "is not UTF-8: byte 0xe4 at offset 0"),
    "late.txt": (write(b"a" * 3_000_000 + b"\xff"), "is not UTF-8: byte 0xff at offset 3000000"),
    "utf16.txt": (write("text".encode("utf-16")), "is not UTF-8: byte 0xff at offset 0"),
    "latin1.jsonl": (
        write(b'{"text": "a"}\n{"text": "caf\xe9"}\n'),
        "is not UTF-8: byte 0xe9 at offset 27",
    ),
    "text.jsonl": (write(b"just text\n"), "line at byte 0 is not JSON .*one JSON object per line"),
    "cut.jsonl": (write(b'{"text": "a"}\n{"text": "b'), "line at byte 14 is not JSON"),
    "array.jsonl": (write(b'["text"]\n'), "line at byte 0 has no key 'text': it is not an object"),
    "nested.jsonl": (write(b"[" * 100_000 + b"\n"), "line at byte 0 is not JSON"),
    "key.jsonl": (
        write(b'{"content": "a", "id": 1}\n'),
        "has no key 'text': it is an object with 'content', 'id'; set ",
    ),
    "number.jsonl": (write(b'{"text": 5}\n'), "'text' of the line at byte 0 is of type int, not text"),
    "cut.jsonl.gz": (truncated(lambda p: write_json_lines(p, texts(500)), 0.5), "truncated or damaged .*download"),
    "not.jsonl.gz": (write(b'{"text": "a"}\n'), "truncated or damaged .*Not a gzipped file"),
    "flipped.jsonl.gz": (
        write(gzip.compress(b'{"text": "a"}\n')[:-6] + b"\0\0\0\0\0\0"),
        "truncated or damaged .*CRC",
    ),
    "cut.txt.xz": (write(lzma.compress(b"abc " * 1000)[:-30]), "truncated or damaged"),
    "not.txt.xz": (write(b"abc"), "truncated or damaged"),
    "second.txt.xz": (
        write(lzma.compress(b"one") + lzma.compress(b"two").replace(b"7zXZ", b"7zXX")),
        "truncated or damaged",
    ),
    "flipped.txt.xz": (
        write(lzma.compress(b"one") + lzma.compress(b"two")[:-1] + b"X"),
        "truncated or damaged",
    ),
    "tail.txt.xz": (write(lzma.compress(b"one") + b"tail of a page"), "truncated or damaged"),
    "padding.txt.xz": (write(lzma.compress(b"one") + bytes(6)), "truncated or damaged .*6 zero bytes"),
    "cut.parquet": (truncated(lambda p: write_parquet(p, texts(500)), 0.5), "truncated or not a parquet file"),
    "not.parquet": (write(b"PAR1 and nothing else PAR1"), "truncated or not a parquet file"),
    "column.parquet": (
        lambda path: write_parquet(path, ["a"], column="content") and None,
        "no column 'text'; set data.text_column to one of url, content",
    ),
    "type.parquet": (parquet_of(pa.int64(), [1]), "column 'text' holds int64, not strings"),
    "binary.parquet": (parquet_of(pa.binary(), [b"a"]), "column 'text' holds binary, not strings"),
    "fifo.txt": (os.mkfifo, "is a directory, a FIFO or a device"),
    "fifo.parquet": (os.mkfifo, "is a directory, a FIFO or a device"),
    "device.txt": (lambda path: path.symlink_to("/dev/zero"), "is a directory, a FIFO or a device"),
    "directory.txt": (Path.mkdir, r"is a directory, not a file; give a glob, such as .*/\*\.txt"),
    "page.pdf": (write(b"%PDF"), r"has none of the known suffixes \.txt, "),
    "nowhere.txt": (lambda path: path.symlink_to("missing"), "does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_what_is_wrong_and_the_remedy(tmp_path: Path, name: str) -> None:
    damage, message = BAD[name]
    damage(tmp_path / name)
    with pytest.raises(DataError, match=rf"(?s){name}.*{message}"):
        read(tmp_path / name)


def test_a_parquet_file_with_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", texts(2000), 2000)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet (is damaged|cannot be read)"):
        read(path)


def test_a_line_is_scanned_once_however_many_segments_would_begin_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans, scan = [], readers._after_line
    monkeypatch.setattr(readers, "_after_line", lambda *place: scans.append(place[1]) or scan(*place))
    documents = ["a" * 50_000, "b", "c" * 50_000]
    path = write_json_lines(tmp_path / "a.jsonl", documents)
    parts = segments(path, "text", 100)
    assert len(scans) <= len(documents)
    assert [text for part in parts for text in read_documents(part, "text", lambda _: None)] == documents


@pytest.mark.parametrize("name", ["long.jsonl", "long.parquet"])
def test_a_document_too_long_to_be_read_whole_is_refused_and_points_to_plain_text(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 1 << 20)
    write_json_lines(tmp_path / name, ["a" * (1 << 21)]) if "json" in name else write_parquet(
        tmp_path / name, ["a" * (1 << 21)]
    )
    with pytest.raises(DataError, match=rf"{name}.* 1 MiB.*\.txt file, which is streamed"):
        read(tmp_path / name)


@pytest.mark.usefixtures("permissions_bind")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("text")
    path.chmod(0)
    with pytest.raises(DataError, match=r"secret.txt cannot be read: permission denied; change its permissions"):
        segments(path, "text", 100)


@pytest.mark.slow
def test_a_text_of_a_hundred_megabytes_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "one_line.txt"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"x" * (1 << 20))
    script = f"""
import resource
from pathlib import Path
from data.readers import read_documents, segments
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(part,) = segments(Path({str(path)!r}), "text", 1 << 40)
characters = sum(len(text) for text in read_documents(part, "text", lambda moved: None))
print(characters, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    characters, grown = map(int, output.split())
    assert characters == 100 << 20
    assert grown < 30, "MiB"
