"""Writing safetensors: atomically, with the folder's permissions, and with an `OSError` where the disk is the reason."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moee.store.atomic import atomic_file


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, no two of which share memory: safetensors refuses others."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        if whole.untyped_storage().data_ptr() in taken:
            whole = whole.clone()
        taken.add(whole.untyped_storage().data_ptr())
        apart[name] = whole
    return apart


def write_tensors(tensors: Mapping[str, Tensor], path: Path | str, metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` to `path`; contiguous copies are made of those that are not, and of those that share memory (CoaT's modules
    do): under each of its names a tensor is in the file.

    Raises `OSError` if the disk is full, read-only or failing: safetensors itself hides the reason in its own error's text.
    """
    path = Path(path)
    with atomic_file(path) as temporary:
        try:
            save_file(_apart(tensors), temporary, metadata=metadata)
        except SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        temporary.chmod(temporary.parent.stat().st_mode & 0o666)  # safetensors makes it private to the user
