"""Keep keys and passwords in the environment: out of configurations, records and logs."""

import os
import re

#: A configuration may not hold the values of these variables.
VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
#: Length of the shortest value taken for a secret: TOKENIZERS_PARALLELISM=false is not one.
SHORTEST = 8
_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
# Matches `tracker.api_key=…` and `export WANDB_API_KEY=…`, but not `eval.tokens=…` or `WANDB_API_KEY=$KEY`.
_GIVEN = re.compile(
    r"""([\w.]*(?:api_?key|access_?key|token|secret|password)=)(?!["']?\$)[^\s,;)\]}]+?(?=:?(?:[\s,;)\]}]|$))""",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Hide values assigned to names of secrets, and values of environment variables with such names."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and any(word in name.upper() for word in _WORDS):
            text = text.replace(value, f"<{name}>")
    return _GIVEN.sub(r"\1<hidden>", text)


def secret_in(text: str) -> str | None:
    """Return the name of a secret that the text holds in plain text, or None."""
    if found := _GIVEN.search(text):
        return found.group(1).removesuffix("=")
    given = {name: os.environ.get(name, "") for name in VARIABLES}
    return next((name for name, value in given.items() if len(value) >= SHORTEST and value in text), None)
