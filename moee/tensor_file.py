"""Writing safetensors: atomically, with the folder's permissions, and with an `OSError` where the disk is the reason."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moee.atomic import atomic_file


def write_tensors(tensors: Mapping[str, Tensor], path: Path | str, metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` to `path`; contiguous copies are made of those that are not.

    Raises `OSError` if the disk is full, read-only or failing: safetensors itself hides the reason in its own error's text.
    """
    path = Path(path)
    with atomic_file(path) as temporary:
        try:
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata=metadata)
        except SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        temporary.chmod(temporary.parent.stat().st_mode & 0o666)  # safetensors makes it private to the user
