"""Files that `moee bundle` copies: the C++ runner and build.sh.

Nothing comes in; their folder goes out.
Imports no other room.
"""

from pathlib import Path

DEPLOY = Path(__file__).resolve().parent
