"""Where this user's programs keep what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from moee.errors import MissingDependency


def cache_home() -> Path:
    """`XDG_CACHE_HOME`, or `~/.cache` where that is empty or not set. Raises `MissingDependency` where nobody knows a home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given) if given else Path.home() / ".cache"
    except RuntimeError as error:
        raise MissingDependency("there is no home folder to keep a cache in; set MOEE_CACHE or HOME to a folder") from error
