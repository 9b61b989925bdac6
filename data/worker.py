"""The child side of a preparation's worker: `python -m data.worker`, started by data/workers.py.

Everything that opens a corpus file runs here. Some damaged files crash the process that reads them (pyarrow aborts on
some broken footers); then only a child dies.

Standard input carries one JSON request per line. Standard output carries one JSON object per line: {"reading": path}
when a file is opened, {"bytes", "tokens", "documents"} done since the last such line, and at the end of a request
{"done": its result} or {"error": the message of a DataError}.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.encoding import DocumentEncoder
from data.errors import DataError
from data.files import cannot_write
from data.manifest import TokenizerInfo
from data.plan import Unit, plan_units
from data.splits import SplitRule
from data.tokenise import make_shards, training_texts
from data.tokenizers import open_tokenizer, train_bpe


@functools.cache
def _encoder(tokenizer: TokenizerInfo, directory: Path) -> DocumentEncoder:
    """One encoder for all units, since its cache warms up."""
    return DocumentEncoder(open_tokenizer(tokenizer, directory))


class Channel:
    """The messages of a request to the parent."""

    def __init__(self) -> None:
        # Only messages go through the pipe; what libraries print goes to standard error.
        self._stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, **message: Any) -> None:
        self._stream.write(json.dumps(message) + "\n")
        self._stream.flush()

    def reading(self, path: str) -> None:
        self.send(reading=path)

    def progress(self, text_bytes: int, tokens: int, documents: int) -> None:
        self.send(bytes=text_bytes, tokens=tokens, documents=documents)


def answer(request: dict[str, Any], channel: Channel) -> Any:
    split = SplitRule(**request["split"])
    text_column = request["text_column"]
    match request["task"]:
        case "plan":
            files = [Path(file) for file in request["files"]]
            units = plan_units(files, text_column, split, request["smallest_unit"], channel.reading)
            return [unit.to_json() for unit in units]
        case "train":
            units = [Unit.from_json(unit) for unit in request["units"]]
            texts = training_texts(units, text_column, split, request["share"], channel.reading)
            return asdict(train_bpe(texts, request["vocab_size"], Path(request["directory"])).info)
        case "shards":
            directory = Path(request["directory"])
            encoder = _encoder(TokenizerInfo(**request["tokenizer"]), directory)
            unit = Unit.from_json(request["unit"])
            make_shards(unit, directory, text_column, split, encoder, request["fingerprint"], channel)
            return None
        case task:
            raise ValueError(f"unknown task {task!r}")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too and decides
    channel = Channel()
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                channel.send(done=answer(request, channel))
            except BrokenPipeError:
                raise
            except DataError as error:
                channel.send(error=str(error))
            except OSError as error:
                channel.send(error=str(cannot_write(error, Path(request["directory"]))))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone


if __name__ == "__main__":
    main()
