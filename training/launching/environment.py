"""Whether the Python that runs is the project's environment: train.py and the scripts ask before they import anything else.

Any Python from 3.7 on reads this file, train.py and the scripts, so that an old one can be told so.
"""

import importlib.util
import os
import sys

from training.exits import EXIT_CONFIGURATION

OLDEST = (3, 11)
#: What no command does without, by the names under which it is imported.
PACKAGES = ("torch", "numpy", "hydra", "pydantic", "rich", "safetensors", "tiktoken", "pyarrow", "scipy")
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
ACTIVATE = os.path.join(ROOT, ".venv", "bin", "activate")


def require_environment() -> None:
    """End this process with one line and exit code 2 where Python is too old or a package is missing."""
    if sys.version_info < OLDEST:
        problem = "Python 3.11 to 3.13 is needed, and {} is {}.{}".format(sys.executable, *sys.version_info[:2])
    else:
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if not missing:
            return
        problem = f"{missing[0]} is not installed in {sys.executable}"
    remedy = f"activate the project's environment: . {os.path.relpath(ACTIVATE)} (make setup makes it)"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {problem}; {remedy}", file=sys.stderr)
    sys.exit(EXIT_CONFIGURATION)
