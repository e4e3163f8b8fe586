"""What a command reads, as paths that no result may replace."""

from __future__ import annotations

import os
from pathlib import Path

from moee.store.result_kinds import BUILT_IN_DATA, kind_of, made_from


def source_paths(*sources: str | Path | None) -> tuple[Path, ...]:
    """What data sources, weights and artifacts name on disk, and what those artifacts say that they were made from.

    Sources such as `wds/FOLDER` and `torch/cifar10@FOLDER` name a folder behind their kind. The name of built-in data names a
    file or an artifact too, if one lies under it; any other folder of that name is read by no command, and no result ever
    replaces it.
    """
    paths: dict[str, Path] = {}  # by real path, so that artifacts that name each other come to an end
    waiting = [os.fspath(source) for source in sources if source]
    while waiting:
        text = waiting.pop(0)
        names = (text, text.partition("/")[2], text.partition("@")[2])
        path = next((Path(name) for name in names if name and os.path.lexists(name)), None)
        if path is None or os.path.realpath(path) in paths:
            continue
        if text.partition(":")[0] in BUILT_IN_DATA and path.is_dir() and kind_of(path) is None:
            continue
        paths[os.path.realpath(path)] = path
        waiting += made_from(path)
    return tuple(paths.values())
