"""Token directories for tests, written shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.manifest import Manifest, Split, TokenizerInfo, token_dtype
from data.shards import ShardWriter, shard_name


def write_token_directory(
    directory: Path,
    train: Sequence[np.ndarray],  # one array of ids per shard
    validation: Sequence[np.ndarray] = (),
    vocab_size: int = 50257,
) -> Manifest:
    directory.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, arrays in (("train", train), ("validation", validation)):
        shards = []
        for number, tokens in enumerate(arrays):
            with ShardWriter(directory / shard_name(split, number), token_dtype(vocab_size)) as writer:
                writer.append(np.asarray(tokens), documents=1)
            assert writer.shard is not None
            shards.append(writer.shard)
        splits[split] = Split(tuple(shards))
    manifest = Manifest(
        source={"kind": "test"},
        split_rule={"rule": "test"},
        tokenizer=TokenizerInfo("gpt2", vocab_size, vocab_size - 1, "0" * 64),
        splits=splits,
    )
    manifest.write(directory)
    return manifest
