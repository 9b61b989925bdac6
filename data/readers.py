"""Corpus files → documents, streamed in memory that does not grow with the file.

A `Segment` is a part of one file that can be read by itself: a byte range cut at a paragraph (.txt) or line (.jsonl),
a run of row groups (.parquet), or the whole file if the format allows no other start (.gz, .xz). Every fault of a file
raises a `DataError` that names the file, the place and the remedy.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data.documents import SEPARATOR, cut_documents
from data.errors import DataError
from data.files import open_regular

if TYPE_CHECKING:
    import pyarrow.parquet

SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.gz", ".parquet")

#: The longest document in JSON Lines and parquet, which are held whole. Plain text is streamed, without a limit.
LONGEST_DOCUMENT = 128 << 20

_CHUNK_BYTES = 1 << 20
_BATCH_ROWS = 64
_COMPRESSION = 4  # estimated bytes of text per compressed byte, to divide the work and show progress

#: Called with the number of (uncompressed or estimated) bytes read since the last call.
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Segment:
    path: str
    start: int  # bytes, or row groups in parquet; 0 in a compressed file
    stop: int
    bytes: int  # of text, possibly estimated
    documents: int | None  # known in advance only in parquet


def suffix_of(path: str | Path) -> str | None:
    name = os.fspath(path).lower()
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)


def text_bytes(path: Path, text_column: str) -> int:
    """The approximate bytes of text in a file. Opens the file, so that an unreadable one is refused before any work.

    Raises:
        DataError: the file is empty, a directory, of an unknown kind, unreadable, or a parquet file without the column.
    """
    suffix = suffix_of(path)
    if path.is_dir():
        raise DataError(f"{path} is a directory, not a file; give a glob, such as {path}/*.txt")
    if suffix is None:
        raise DataError(f"{path} has none of the known suffixes {', '.join(SUFFIXES)}; rename it, or narrow the glob")
    with _faults_named(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise DataError(f"{path} is empty; remove it or download it again")
    if suffix == ".parquet":
        return sum(segment.bytes for segment in _row_groups(path, text_column))
    return size * (_COMPRESSION if suffix.endswith(("gz", "xz")) else 1)


def segments(path: Path, text_column: str, limit: int) -> list[Segment]:
    """Cut a file into segments of about `limit` bytes of text, if its format allows.

    Raises:
        DataError: as `text_bytes`.
    """
    size = text_bytes(path, text_column)
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _row_groups(path, text_column)
    if suffix not in (".txt", ".jsonl"):
        return [Segment(os.fspath(path), 0, 0, size, None)]
    parts = -(-size // limit)
    nominal = [size * part // parts for part in range(1, parts)]
    with _faults_named(path), open_regular(path) as file:
        if suffix == ".txt":
            inner = [_after_paragraph(file, place, size) for place in nominal]
        else:
            inner = _after_lines(file, nominal, size)
    bounds = sorted({0, *inner, size})
    return [Segment(os.fspath(path), start, stop, stop - start, None) for start, stop in itertools.pairwise(bounds)]


def read_documents(segment: Segment, text_column: str, advance: Advance) -> Iterator[str | None]:
    """The documents of a segment, in order; None for a parquet row without text, so that rows keep their numbers.

    Raises:
        DataError: the file is damaged, not UTF-8, or lacks the column.
    """
    path = Path(segment.path)
    with _faults_named(path):
        match suffix_of(path):
            case ".parquet":
                yield from _read_parquet(path, segment, text_column, advance)
            case ".jsonl":
                with open_regular(path) as file:
                    file.seek(segment.start)
                    yield from _read_json_lines(path, file, segment.start, segment.stop, text_column, advance)
            case ".jsonl.gz":
                with open_regular(path) as packed, gzip.GzipFile(fileobj=packed) as file:
                    yield from _read_json_lines(path, file, 0, None, text_column, _compressed(packed, advance))
            case ".txt":
                with open_regular(path) as file:
                    file.seek(segment.start)
                    yield from cut_documents(_read_text(path, file.read, segment.start, segment.stop, advance))
            case ".txt.xz":
                with open_regular(path) as packed:
                    chunks = _decompress_xz(packed)
                    moved = _compressed(packed, advance)
                    yield from cut_documents(_read_text(path, lambda _: next(chunks, b""), 0, None, moved))
            case _:
                raise DataError(f"{path} has none of the known suffixes {', '.join(SUFFIXES)}")


def _compressed(packed: IO[bytes], advance: Advance) -> Advance:
    """Report progress from compressed bytes, since the uncompressed size is unknown."""
    done = 0

    def moved(_: int) -> None:
        nonlocal done
        place = packed.tell()
        advance((place - done) * _COMPRESSION)
        done = place

    return moved


@contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged or unreadable file into a DataError that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); download or compress it again") from error
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: permission denied; change its permissions (chmod +r)") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist or is a broken link; restore or remove it") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check the disk, or download the file again"
        ) from error


# Plain text


def _read_text(
    path: Path, read: Callable[[int], bytes], start: int, stop: int | None, advance: Advance
) -> Iterator[str]:
    """Decode UTF-8 strictly; line ends become "\\n", and a leading byte order mark is dropped."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    place = start
    while True:
        wanted = _CHUNK_BYTES if stop is None else min(_CHUNK_BYTES, stop - place)
        chunk = read(wanted) if wanted else b""
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, place - pending + error.start, error) from error
        if place == 0:
            text = text.removeprefix("\ufeff")
        place += len(chunk)
        advance(len(chunk))
        yield newlines.decode(text, final=not chunk)
        if not chunk:
            return


def _decompress_xz(packed: IO[bytes]) -> Iterator[bytes]:
    """The content of all streams of an .xz file in chunks, none empty; between streams only zero padding is allowed.

    lzma.LZMAFile would take a damaged stream after the first, or one after padding, for trailing garbage and drop it.

    Raises:
        EOFError, lzma.LZMAError: the file is truncated or damaged.
    """
    data = packed.read(_CHUNK_BYTES)
    while True:
        stream = lzma.LZMADecompressor()
        while not stream.eof:
            if stream.needs_input and not data and not (data := packed.read(_CHUNK_BYTES)):
                raise EOFError("it ends inside a stream")
            if chunk := stream.decompress(data, _CHUNK_BYTES):
                yield chunk
            data = b""
        data, padding = stream.unused_data, 0
        while data := data or packed.read(_CHUNK_BYTES):
            padding += len(data)
            data = data.lstrip(b"\0")
            padding -= len(data)
            if data:
                break
        if padding % 4:
            raise lzma.LZMAError(f"{padding} zero bytes after a stream, not a multiple of four")
        if not data:
            return


def _not_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset} ({error.reason}); convert it, e.g. with "
        f"iconv -f latin1 -t utf-8"
    )


def _after_paragraph(file: IO[bytes], nominal: int, size: int) -> int:
    """The first offset at or after `nominal` where a paragraph starts, else a line, a document, a word or a character."""
    separator = SEPARATOR.encode()
    before = min(nominal, len(separator))
    file.seek(nominal - before)
    around = file.read(before + _CHUNK_BYTES)  # from before, since no place inside a separator will do
    window = around[before:]
    for end in (b"\n\n", b"\r\n\r\n", b"\n"):
        found = window.find(end)
        if found >= 0:
            return nominal + found + len(end)
    if (found := around.find(separator)) >= 0:
        return nominal - before + found + len(separator)
    if (found := window.find(b" ")) >= 0:
        return nominal + found + 1
    continued = 0
    while continued < len(window) and window[continued] & 0xC0 == 0x80:
        continued += 1
    return min(nominal + continued, size)


# JSON Lines


def _after_lines(file: IO[bytes], nominal: list[int], size: int) -> list[int]:
    """The first line starts at or after the ascending `nominal` offsets; a line of any length is read once."""
    found = [0]
    for place in nominal:
        if place > found[-1]:
            found.append(_after_line(file, place, size))
    return found


def _after_line(file: IO[bytes], nominal: int, size: int) -> int:
    file.seek(nominal - 1)
    while True:
        chunk = file.readline(_CHUNK_BYTES)
        if chunk.endswith(b"\n") or not chunk:
            return min(file.tell(), size)


def _read_json_lines(
    path: Path, file: IO[bytes] | gzip.GzipFile, start: int, stop: int | None, text_column: str, advance: Advance
) -> Iterator[str]:
    place = start
    while stop is None or place < stop:
        line = file.readline(LONGEST_DOCUMENT + 1)
        if not line:
            return
        if len(line) > LONGEST_DOCUMENT:
            raise DataError(
                f"{path}: the line at byte {place} is longer than {LONGEST_DOCUMENT >> 20} MiB; write one JSON object "
                "per line, and put longer documents into a .txt file, which is streamed"
            )
        text = _text_of_line(path, line, place, text_column)
        place += len(line)
        advance(len(line))
        if text is not None:
            yield text


def _text_of_line(path: Path, line: bytes, place: int, text_column: str) -> str | None:
    if not line.strip():
        return None
    if place == 0:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(path, place + error.start, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: the line at byte {place} is not JSON ({error}); write one JSON object per line"
        ) from error
    if not isinstance(row, dict) or text_column not in row:
        given = f"an object with {', '.join(map(repr, row)) or 'no keys'}" if isinstance(row, dict) else "not an object"
        raise DataError(
            f"{path}: the line at byte {place} has no key {text_column!r}: it is {given}; set data.text_column to the "
            "key that holds the text"
        )
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{path}: {text_column!r} of the line at byte {place} is of type {type(text).__name__}, not text; set "
            "data.text_column to the key that holds the text"
        )
    return text


# Parquet


def _open_parquet(path: Path, text_column: str) -> pyarrow.parquet.ParquetFile:
    """Open a parquet file and check its column.

    Memory mapping without read-ahead holds one page of the column at a time instead of a row group.
    """
    import pyarrow
    import pyarrow.parquet
    import pyarrow.types

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path} is truncated or not a parquet file ({_first_line(error)}); download or write it again"
        ) from error
    names = file.schema_arrow.names
    if text_column not in names:
        raise DataError(f"{path} has no column {text_column!r}; set data.text_column to one of {', '.join(names)}")
    kind = file.schema_arrow.field(text_column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise DataError(
            f"{path}: column {text_column!r} holds {kind}, not strings; set data.text_column to a column of text"
        )
    return file


def _row_groups(path: Path, text_column: str) -> list[Segment]:
    with _faults_named(path), _arrow_faults_named(path), _open_parquet(path, text_column) as file:
        metadata: Any = file.metadata
        places = [place for place in range(metadata.num_columns) if metadata.schema.column(place).path == text_column]
        if len(places) != 1:
            raise DataError(f"{path} is damaged: it has {len(places)} columns {text_column!r}; write it again")
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return [
            Segment(
                os.fspath(path), number, number + 1, group.column(places[0]).total_uncompressed_size, group.num_rows
            )
            for number, group in enumerate(groups)
        ]


def _read_parquet(path: Path, segment: Segment, text_column: str, advance: Advance) -> Iterator[str | None]:
    with _arrow_faults_named(path), _open_parquet(path, text_column) as file:
        batches = file.iter_batches(
            batch_size=_BATCH_ROWS,
            row_groups=range(segment.start, segment.stop),
            columns=[text_column],
            use_threads=False,
        )
        for batch in batches:
            column = batch.column(0)
            for place in range(len(column)):
                yield _text_of_cell(path, column[place], text_column)
            advance(column.nbytes)


@contextmanager
def _arrow_faults_named(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is damaged ({_first_line(error)}); download or write it again") from error


def _text_of_cell(path: Path, cell: Any, text_column: str) -> str | None:
    if not cell.is_valid:
        return None
    content = cell.as_buffer()
    if content.size > LONGEST_DOCUMENT:
        raise DataError(
            f"{path}: a text in column {text_column!r} has {content.size >> 20} MiB; the limit is "
            f"{LONGEST_DOCUMENT >> 20} MiB; put longer documents into a .txt file, which is streamed"
        )
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path} is damaged: a text in column {text_column!r} is not UTF-8 (byte 0x{byte:02x}); write it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
