"""Export a trained model to a Hugging Face directory, and to the Hugging Face Hub.

    python scripts/export.py runs/<name> exported
    python scripts/export.py runs/<name>/checkpoints/step-00000100 exported --overwrite
    python scripts/export.py runs/<name> exported --hub=<user>/<model> --dry-run     shows what would be sent
    python scripts/export.py runs/<name> exported --hub=<user>/<model>

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
from training.exits import refuse
from training.recording.terminal import printable
from training.reliability.run_directory import refuse_absent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory, or one of its checkpoints")
    parser.add_argument("directory", type=Path, help="the directory to create")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--token-directory", type=Path, help="the run's prepared tokens, if they have moved")
    parser.add_argument("--hub", metavar="USER/MODEL", help="upload the export to this repository of the Hub")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument(
        "--licence", help="of the weights, as the Hub's identifier, for example mit; not stated without it"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="export and show what --hub would send; needs no network"
    )
    options = parser.parse_args(arguments)
    try:
        refuse_absent(options.run)
        if options.hub is None and (options.dry_run or options.private):
            raise ConfigurationError("--dry-run and --private have no effect without --hub; add --hub=<user>/<model>")
    except ConfigurationError as error:
        return refuse(error)

    from downstream.export import ExportError, export, quiet_transformers, refuse_hub_name, upload
    from downstream.inference import OPENING_ERRORS, open_trained

    try:
        if options.hub is not None:
            refuse_hub_name(options.hub)
        trained = open_trained(options.run, tokens=options.token_directory)
        for line in trained.passed_over:
            print(printable(f"checkpoint skipped: {line}"), file=sys.stderr)
        with quiet_transformers():
            difference = export(trained, options.directory, overwrite=options.overwrite, licence=options.licence)
        said = (
            f"{options.directory}: exported {trained.checkpoint}; transformers gives the same ids, and logits within "
        )
        print(printable(f"{said}{difference:.1g}"))
        if options.dry_run:
            print(printable(f"--hub {options.hub} would send:"))
            for file in sorted(options.directory.iterdir()):
                print(printable(f"{file.stat().st_size:>14,}  {file.name}"))
            for line in (options.directory / "README.md").read_text(encoding="utf-8").splitlines():
                print(printable(line))
        elif options.hub is not None:
            print(printable(upload(options.directory, options.hub, private=options.private)))
    except (*OPENING_ERRORS, ExportError) as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
