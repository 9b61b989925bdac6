"""Prepare a corpus's tokens: text → tokenizer → shards and manifest in tokens/<source>-<tokenizer>.

    python scripts/prepare_data.py data=openwebtext
    python scripts/prepare_data.py data=text 'data.paths=[corpus/*.txt]' tokenizer=bpe tokenizer.vocab_size=8192
    python scripts/prepare_data.py data=openwebtext --workers 16
    python scripts/prepare_data.py data=openwebtext --verify        hash every shard against the manifest

It can be interrupted at any moment; rerun the same command to resume. Overrides are those of train.py.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from data.errors import DataError
from training.compose import compose
from training.config import ConfigurationError
from training.exits import refuse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="data=…, tokenizer=… and their keys")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: all usable cores)")
    parser.add_argument("--verify", action="store_true", help="only check the sha256 of every shard")
    arguments = parser.parse_intermixed_args()
    if arguments.workers is not None and arguments.workers < 1:
        return refuse(ConfigurationError(f"--workers {arguments.workers}: expected a number of at least 1"))
    try:
        config = compose(arguments.overrides)

        from data.manifest import verify
        from data.preparation import prepare
        from data.progress import progress_display
        from training.corpus import source_of, token_directory_of, tokenizer_of

        directory = token_directory_of(config)
        if arguments.verify:
            manifest = verify(directory, report=print)
        else:
            manifest = prepare(
                source_of(config),
                tokenizer_of(config),
                directory,
                workers=arguments.workers,
                progress=progress_display(),
            )
    except (ConfigurationError, DataError) as error:
        return refuse(error)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.tokens:,} tokens, {split.documents:,} documents, {len(split.shards)} shards")
    print(f"{directory} (manifest {manifest.sha256[:12]})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
