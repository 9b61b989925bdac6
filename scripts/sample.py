"""Sample text from a trained model.

    python scripts/sample.py runs/<name> --prompt "It was" --tokens 200 --temperature 0.8 --top-k 50 --seed 0
    python scripts/sample.py runs/<name>/checkpoints/step-00000100 --samples 3
    python scripts/sample.py runs/<name> --prompt "$(cat story.txt)" --temperature 0

Uses the run's newest valid checkpoint. The text goes to standard output as it is drawn, everything else to standard
error. The same seed gives the same text.
"""

import argparse
import os
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
    parser.add_argument("--prompt", default="", help="the beginning of the text (default: start a new text)")
    parser.add_argument(
        "--tokens", type=int, default=200, help="the most tokens to draw; the model may end the text earlier (200)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw only from the k likeliest tokens; 0: from all (0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw only from the likeliest tokens that hold this probability (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; later samples use the next seeds (0)")
    parser.add_argument("--samples", type=int, default=1, help="number of texts (1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--allow-code", action="store_true", help="run the code that a model of your own names")
    parser.add_argument("--token-directory", type=Path, help="the run's prepared tokens, if they have moved")
    options = parser.parse_args(arguments)
    try:
        check(options)
    except ConfigurationError as error:
        return refuse(error)

    from downstream.inference import OPENING_ERRORS

    try:
        return sample(options)
    except OPENING_ERRORS as error:
        return refuse(error)
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    except BrokenPipeError:  # the reader, e.g. head, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def check(options: argparse.Namespace) -> None:
    """Refuse bad options before torch is imported.

    Raises:
        ConfigurationError: there is no such directory, or a number is out of range.
    """
    for name, least in (("tokens", 1), ("samples", 1), ("seed", 0), ("top_k", 0)):
        if getattr(options, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigurationError(f"{option} {getattr(options, name)}: expected a number of at least {least}")
    refuse_absent(options.run)


def sample(options: argparse.Namespace) -> int:
    """Draw and print the samples; return the exit code."""
    from downstream.inference import Sampling, as_text, choose_device, generate, open_trained

    sampling = Sampling(options.temperature, options.top_k or None, options.top_p)
    device, tokens = choose_device(options.device), options.token_directory
    trained = open_trained(options.run, device=device, tokens=tokens, allow_code=options.allow_code)
    for line in trained.passed_over:
        print(printable(f"checkpoint skipped: {line}"), file=sys.stderr)
    tokenizer, context = trained.tokenizer, trained.model.block_size
    prompt = [int(token) for token in tokenizer.encode(options.prompt)]
    if len(prompt) > context:
        print(
            f"the prompt has {len(prompt)} tokens; the model sees only the last {context}",
            file=sys.stderr,
        )
    for number in range(options.samples):
        seed = options.seed + number
        print(printable(f"{trained.checkpoint}, seed {seed}:"), file=sys.stderr, flush=True)
        write(tokenizer.decode(prompt))
        drawn = generate(
            trained.model, prompt or [tokenizer.end_of_text], options.tokens, sampling, seed, tokenizer.end_of_text
        )
        for text in as_text(tokenizer, drawn):
            write(text)
        write("\n")
    return 0


def write(text: str) -> None:
    """Print immediately. On a terminal, escape control characters, which an untrained model draws often."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
