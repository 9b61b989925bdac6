"""Check that the project's environment is active. train.py and the scripts do so before any other import.

This file, train.py and the scripts parse on Python 3.7 and newer, so that an old Python gets the message.
"""

import importlib.util
import os
import sys

from training.exits import EXIT_CONFIGURATION

OLDEST = (3, 11)
#: Every command needs these, by import name.
PACKAGES = ("torch", "numpy", "hydra", "pydantic", "rich", "safetensors", "tiktoken", "pyarrow", "scipy")
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
ACTIVATE = os.path.join(ROOT, ".venv", "bin", "activate")


def require_environment() -> None:
    """Exit with one line and code 2 if Python is too old or a package is missing."""
    if sys.version_info < OLDEST:
        problem = "{} is Python {}.{}, but 3.11 to 3.13 is needed".format(sys.executable, *sys.version_info[:2])
    else:
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if not missing:
            return
        problem = f"{missing[0]} is not installed in {sys.executable}"
    remedy = f"activate the project's environment: . {os.path.relpath(ACTIVATE)} (make setup creates it)"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {problem}; {remedy}", file=sys.stderr)
    sys.exit(EXIT_CONFIGURATION)
