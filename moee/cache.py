"""The user's cache folder, and cluster labels in it: what lets an interrupted extraction go on where it stopped."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def cache_dir() -> Path:
    """`MOEE_CACHE`, or `moee` below `XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("MOEE_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moee"


def tensor_hash(*tensors: Tensor, extra: str = "") -> str:
    """SHA-256 over shapes, types and bytes of the tensors, and a string."""
    digest = hashlib.sha256(extra.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_labels(key: str, count: int) -> Tensor | None:
    """Labels [count] int64 stored under `key`, or None if there are none or the file is damaged."""
    path = cache_dir() / "labels" / f"{key}.safetensors"
    try:
        labels = load_file(path)["labels"]
    except (OSError, SafetensorError, KeyError):
        return None
    return labels if labels.dtype == torch.int64 and labels.shape == (count,) else None


def write_labels(key: str, labels: Tensor) -> None:
    """Store labels under `key`, atomically; a cache that cannot be written is no error."""
    path = cache_dir() / "labels" / f"{key}.safetensors"
    temporary = path.with_name(f".{key}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"labels": labels.contiguous()}, temporary)
        os.replace(temporary, path)
    except OSError:
        return
    finally:
        temporary.unlink(missing_ok=True)
