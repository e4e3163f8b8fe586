"""The user's cache folder, and cluster labels in it: what lets an interrupted extraction go on where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moee.errors import UserError
from moee.progress import Reporter, silent
from moee.store.home import cache_home
from moee.store.leftovers import sweep_all
from moee.store.tensor_file import write_tensors


def cache_dir() -> Path:
    """`MOEE_CACHE`, or `moee` below `XDG_CACHE_HOME` or `~/.cache`. What is empty counts as not set."""
    base = os.environ.get("MOEE_CACHE")
    return Path(base) if base else cache_home() / "moee"


@contextmanager
def cache_lock(name: str, report: Reporter = silent) -> Iterator[None]:
    """Hold the cache's lock `name`: of processes that want to make the same entry, one makes it and the others wait for it.

    The lock ends with the process that holds it. On a file system without locks nobody waits; entries are written atomically
    either way.
    """
    path = cache_dir() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_all(cache_dir())
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"another process makes {name}, waiting", 0, 0)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def tensor_hash(*tensors: Tensor, extra: str = "") -> str:
    """SHA-256 over shapes, types and bytes of the tensors, and a string."""
    digest = hashlib.sha256(extra.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_labels(key: str, count: int) -> Tensor | None:
    """Labels [count] int64 stored under `key`, or None if there are none or the file is damaged."""
    path = cache_dir() / "labels" / f"{key}.safetensors"
    sweep_all(path.parent)
    try:
        labels = load_file(path)["labels"]
    except (OSError, SafetensorError, KeyError):
        return None
    return labels if labels.dtype == torch.int64 and labels.shape == (count,) else None


def write_labels(key: str, labels: Tensor) -> None:
    """Store labels under `key`, atomically; a cache that cannot be written is no error."""
    try:
        write_tensors({"labels": labels}, cache_dir() / "labels" / f"{key}.safetensors")
    except (OSError, UserError):
        return
