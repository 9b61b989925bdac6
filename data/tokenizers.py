"""Text → token ids: GPT-2's own vocabulary, or a byte-level BPE trained on the corpus.

Both use the same algorithm, GPT-2's pre-tokenisation followed by byte-pair merges, and both run in tiktoken, which is
several times faster than the `tokenizers` library that trains the second. GPT-2's is built offline from OpenAI's
`vocab.bpe`: the order of the bytes and the list of merges determine every id.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken

from data.errors import DataError
from data.files import read_json, written_beside
from data.manifest import TokenizerInfo, load_manifest

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_BYTES = 256 << 20

_VOCAB_BPE = Path(__file__).parent / "sample" / "gpt2_vocab.bpe"
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # as tiktoken pins it

# GPT-2's pre-tokenisation, 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+, in the
# equivalent form that tiktoken ships for speed.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# Longer texts are encoded in pieces: this bounds memory, and the regex engine fails on long runs of white space. No
# pre-token continues from a non-space character into white space, so a cut between the two changes nothing.
_PIECE_CHARACTERS = 1 << 16
_CUT = re.compile(r"\S(?=[ \n])")


@dataclass(frozen=True)
class TokenizerSpec:
    """A choice of tokenizer: GPT-2's, or a BPE of `vocab_size` ids (end of text included) trained on the corpus."""

    name: str = "gpt2"  # "gpt2" | "bpe"
    vocab_size: int | None = None  # only for "bpe"

    def __post_init__(self) -> None:
        if self.name not in ("gpt2", "bpe"):
            raise DataError(f"tokenizer.name={self.name!r} is unknown; choose gpt2 or bpe")
        if self.name == "bpe" and not (isinstance(self.vocab_size, int) and self.vocab_size > 256 + 1):
            raise DataError(
                f"tokenizer.vocab_size={self.vocab_size}: a trained tokenizer needs more than 257 ids "
                "(the 256 bytes, the end of text, and at least one merge)"
            )

    @property
    def label(self) -> str:
        """Short name for directories: "gpt2", "bpe4096"."""
        return self.name if self.name == "gpt2" else f"{self.name}{self.vocab_size}"


class Tokenizer:
    """A byte-level BPE with ids 0 … vocab_size - 2 for byte strings, and the last id for the end of text.

    Args:
        name: "gpt2" or "bpe".
        ranks: the id of each token's bytes; ids are consecutive from 0 and give the priority of merges.
    """

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        self.name = name
        self.end_of_text = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the vocabulary in tiktoken's file format (for GPT-2, the hash that tiktoken pins)."""
        lines = (
            base64.b64encode(token) + b" %d\n" % rank
            for token, rank in sorted(self._ranks.items(), key=lambda item: item[1])
        )
        return hashlib.sha256(b"".join(lines)).hexdigest()

    @property
    def info(self) -> TokenizerInfo:
        return TokenizerInfo(self.name, self.vocab_size, self.end_of_text, self.sha256)

    @property
    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id is, (vocab_size,) int64; none for the end of text."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (n,) uint32. Special tokens written in the text are treated as ordinary characters."""
        pieces = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _pieces(repaired(text))]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.uint32), *pieces])

    def encode_list(self, text: str) -> list[int]:
        """`encode` to a list, which is faster for short texts."""
        return [token for piece in _pieces(repaired(text)) for token in self._encoding.encode_ordinary(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; invalid UTF-8 becomes U+FFFD."""
        return self._encoding.decode([int(token) for token in ids])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, which may start or end inside a character."""
        return self._encoding.decode_bytes([int(token) for token in ids])

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """This tokenizer, id for id, as one of Hugging Face's `tokenizers`.

        One difference, usual there: END_OF_TEXT written in a text becomes the special token.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        character = {byte: character for character, byte in _byte_of_character().items()}
        written = {token: "".join(character[byte] for byte in token) for token in self._ranks}
        merges = [(written[first], written[second]) for first, second in self._merges()]
        result = tokenizers.Tokenizer(models.BPE({written[token]: rank for token, rank in self._ranks.items()}, merges))
        result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        result.decoder = decoders.ByteLevel()
        result.add_special_tokens([END_OF_TEXT])
        return result

    def _merges(self) -> Iterator[tuple[bytes, bytes]]:
        """The two tokens that each longer token merges: what is left of its bytes after all merges of lower rank."""
        for token, rank in sorted(self._ranks.items(), key=lambda item: item[1]):
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:
                pairs = [self._ranks.get(first + second, rank) for first, second in itertools.pairwise(parts)]
                place = pairs.index(min(pairs))
                parts[place : place + 2] = [parts[place] + parts[place + 1]]
            if len(parts) == 2:
                yield parts[0], parts[1]


def repaired(text: str) -> str:
    """The text with lone surrogates, which JSON can escape but UTF-8 cannot encode, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text where no token can span the cut, else at twice the length of a piece."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        limit = start + 2 * _PIECE_CHARACTERS
        found = _CUT.search(text, start + _PIECE_CHARACTERS - 1, limit + 1)
        stop = found.end() if found else limit
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def may_cut_pretokens(text: str) -> bool:
    """Whether `encode` may cut a text inside a pre-token, so that the ids depend on where the pre-token stands.

    If False, every stretch of a piece's length has a place to cut.
    """
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        found = _CUT.search(text, start + _PIECE_CHARACTERS // 2, start + _PIECE_CHARACTERS)
        if found is None:
            return True
        start = found.end()
    return False


def _byte_of_character() -> dict[str, int]:
    """The characters that stand for the 256 bytes in GPT-2's files, in the order of their ids."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


@functools.cache
def gpt2() -> Tokenizer:
    """GPT-2's tokenizer: the ids of `tiktoken.get_encoding("gpt2")`, without a download.

    Raises:
        DataError: data/sample/gpt2_vocab.bpe is missing or is not OpenAI's.
    """
    try:
        content = _VOCAB_BPE.read_bytes()
    except OSError as error:
        raise DataError(f"{_VOCAB_BPE} cannot be read: {error.strerror}; restore it from the repository") from error
    found = hashlib.sha256(content).hexdigest()
    if found != _VOCAB_BPE_SHA256:
        raise DataError(
            f"{_VOCAB_BPE} is not GPT-2's vocab.bpe: its sha256 is {found}, not {_VOCAB_BPE_SHA256}; "
            "restore it from the repository"
        )
    to_byte = _byte_of_character()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(to_byte.values())}
    for line in content.decode().splitlines()[1:]:  # the first line is "#version: 0.2"
        first, second = line.split()
        ranks[bytes(to_byte[character] for character in first + second)] = len(ranks)
    return Tokenizer("gpt2", ranks)


def train_bpe(texts: Iterable[str], vocab_size: int, directory: Path) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenisation and write it to `directory/tokenizer.json`.

    The result depends only on the texts and the size, not on the number of threads. The file is in the format of
    Hugging Face's `tokenizers`, which transformers reads too.

    Raises:
        DataError: the texts have too few repeated pairs for a vocabulary of this size.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    found = trained.get_vocab_size()
    if found < vocab_size - 1:
        raise DataError(
            f"tokenizer.vocab_size={vocab_size} is too large for this corpus, which gives only {found + 1} ids; "
            f"choose at most {found + 1}, or a larger corpus"
        )
    trained.add_special_tokens([END_OF_TEXT])
    with written_beside(directory / TOKENIZER_FILE) as file:
        file.write(trained.to_str(pretty=True).encode())
    return read_bpe(directory / TOKENIZER_FILE)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a prepared token directory.

    Raises:
        DataError: the directory is not prepared, or its tokenizer did not make its tokens.
    """
    return open_tokenizer(load_manifest(directory).tokenizer, Path(directory))


def open_tokenizer(expected: TokenizerInfo, directory: Path) -> Tokenizer:
    """The tokenizer that `expected` describes; a trained one is read from `directory`.

    Raises:
        DataError: it cannot be read, or its hash differs.
    """
    tokenizer = gpt2() if expected.name == "gpt2" else read_bpe(directory / TOKENIZER_FILE)
    if tokenizer.sha256 != expected.sha256:
        raise DataError(
            f"{directory} was prepared with a tokenizer of sha256 {expected.sha256}, but the {tokenizer.name} tokenizer "
            f"has {tokenizer.sha256}; restore {TOKENIZER_FILE}, or remove the directory and prepare it again"
        )
    return tokenizer


def read_bpe(path: Path) -> Tokenizer:
    """Read a trained tokenizer.

    Raises:
        DataError: the file is missing, damaged, or holds another kind of tokenizer.
    """
    to_byte = _byte_of_character()
    try:
        vocabulary: dict[str, int] = read_json(path, _TOKENIZER_BYTES)["model"]["vocab"]
        ranks = {
            bytes(to_byte[character] for character in token): rank
            for token, rank in vocabulary.items()
            if token != END_OF_TEXT
        }
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("ids are not consecutive")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; prepare the corpus again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged or not a byte-level BPE: {error!r}; prepare the corpus again") from error
    return Tokenizer("bpe", ranks)
