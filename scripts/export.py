"""Export a trained model to a Hugging Face directory.

    python scripts/export.py runs/<name> exported
    python scripts/export.py runs/<name>/checkpoints/step-00000100 exported --overwrite

Uses the run's newest valid checkpoint. transformers' AutoModelForCausalLM and AutoTokenizer load the directory without a
network. It is compared with the run's model before it is renamed to its final name.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from training.config import ConfigurationError
from training.launching.command import refuse
from training.recording.terminal import printable
from training.reliability.run_directory import refuse_absent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory, or one of its checkpoints")
    parser.add_argument("directory", type=Path, help="the directory to create")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--token-directory", type=Path, help="the run's prepared tokens, if they have moved")
    options = parser.parse_args(arguments)
    try:
        refuse_absent(options.run)
    except ConfigurationError as error:
        return refuse(error)

    from downstream.export import ExportError, export, quiet_transformers
    from downstream.inference import OPENING_ERRORS, open_trained

    try:
        trained = open_trained(options.run, tokens=options.token_directory)
        for line in trained.passed_over:
            print(printable(f"checkpoint skipped: {line}"), file=sys.stderr)
        with quiet_transformers():
            difference = export(trained, options.directory, overwrite=options.overwrite)
    except (*OPENING_ERRORS, ExportError) as error:
        return refuse(error)
    said = f"{options.directory}: exported {trained.checkpoint}; transformers gives the same ids, and logits within "
    print(printable(f"{said}{difference:.1g}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
