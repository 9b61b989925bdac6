"""Keys and passwords: they live in the environment, and reach neither configuration nor record nor log."""

import os
import re

#: Variables of which a configuration may not hold the value.
VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
#: Characters of the shortest secret that is looked for: TOKENIZERS_PARALLELISM=false is none.
SHORTEST = 8
_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
# `tracker.api_key=…`, `export WANDB_API_KEY=…`; `eval.tokens=…` is none, and `WANDB_API_KEY=$KEY` holds none.
_GIVEN = re.compile(
    r"""([\w.]*(?:api_?key|access_?key|token|secret|password)=)(?!["']?\$)[^\s,;)\]}]+?(?=:?(?:[\s,;)\]}]|$))""",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """The text without what is given to names of secrets, and without the values of such environment variables."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and any(word in name.upper() for word in _WORDS):
            text = text.replace(value, f"<{name}>")
    return _GIVEN.sub(r"\1<hidden>", text)


def secret_in(text: str) -> str | None:
    """The name of a secret that the text holds in the clear, None where it holds none."""
    if found := _GIVEN.search(text):
        return found.group(1).removesuffix("=")
    given = {name: os.environ.get(name, "") for name in VARIABLES}
    return next((name for name, value in given.items() if len(value) >= SHORTEST and value in text), None)
