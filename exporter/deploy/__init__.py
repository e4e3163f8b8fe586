"""Files that `moee bundle` copies: the C++ runner and build.sh."""

from pathlib import Path

DEPLOY = Path(__file__).resolve().parent
