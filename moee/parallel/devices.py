"""Where torch computes: the device that a user names, tried before any work, and the settings under which it is exact there."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moee.errors import UserError
from moee.schema import reason_of, shown

log = logging.getLogger("moee")
AUTO, CPU = "auto", torch.device("cpu")
EXPECTED = "auto, cpu, cuda or cuda:N"


@dataclass(frozen=True)
class Rank:
    """A process's place in a run of `world` ranks, as far as devices go: its number on its own machine, and that of the ranks
    there (None: unknown)."""

    world: int = 1
    local: int = 0
    neighbours: int | None = None


def chosen_device(name: str = AUTO, rank: Rank | None = None, option: str = "--device") -> torch.device:
    """The device called `name`, with its number, on which a product has been computed.

    `auto` is a GPU if there is one, else the CPU; `cuda` the first GPU; `cuda:1` the second. For one `rank` of several, `auto`
    and `cuda` are the GPU of its number on its machine. Raises `UserError`, which names `option`, for an unknown name, for a GPU
    that is not there or does not work, and for one that several ranks would share.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise UserError(f"{option} {shown(name)}: expected {EXPECTED}")
    rank = rank or Rank()
    number = None if match[1] is None else int(match[1])
    if name == "cpu":
        return CPU
    if number is not None and rank.world > 1:
        raise UserError(f"{option} {name} with {rank.world} ranks: each has a GPU of its own; give cuda, or start one process")
    missing = obstacle(rank)
    if missing and name == AUTO:
        return CPU
    if missing:
        raise UserError(f"{option} {name}: {missing}; give cpu, or leave {option} out")
    count = torch.cuda.device_count()
    _refuse_crowd(rank, count, option)
    number = rank.local if number is None else number
    if number >= count:
        there = "is one GPU, cuda:0" if count == 1 else f"are {count} GPUs, cuda:0 to cuda:{count - 1}"
        raise UserError(f"{option} {name}: there {there}; give one that is there")
    device = torch.device("cuda", number)
    trouble = _trouble(device)
    if trouble and name == AUTO and rank.world == 1:
        log.warning("%s does not work here: %s", title_of(device), trouble)
        return CPU
    if trouble:
        raise UserError(f"{option} {name}: {title_of(device)} does not work here: {trouble}; give cpu")
    return device


def obstacle(rank: Rank | None = None) -> str:
    """Why torch cannot compute on a GPU on this machine; empty if it can."""
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    if not torch.cuda.is_available() or not torch.cuda.device_count():
        return "no GPU was found"
    if rank is not None and rank.world > 1 and not dist.is_nccl_available():
        return "this torch is built without NCCL, by which the ranks' GPUs talk"
    return ""


def _refuse_crowd(rank: Rank, count: int, option: str) -> None:
    """Every rank of a machine refuses if there are more of them than its `count` GPUs."""
    needed = max(rank.neighbours or 0, rank.local + 1)
    if rank.world > 1 and needed > count:
        raise UserError(
            f"{needed} ranks on a machine of {count} {'GPU' if count == 1 else 'GPUs'}: each needs one of its own; start fewer, "
            f"or give {option} cpu"
        )


def _trouble(device: torch.device) -> str:
    """Why a first product on the device fails; empty if it does not. A GPU may be too old for this torch, or taken."""
    try:
        one = torch.ones(2, 2, device=device)
        value = float((one @ one).sum())
    except Exception as error:  # a driver raises what it likes
        return reason_of(error)
    return "" if value == 8.0 else f"the sum of a product of ones is {value:g}"


def title_of(device: torch.device) -> str:
    """A device as records and messages call it: `cuda:0 (NVIDIA H200)`, `cpu`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def say_device(device: torch.device, name: str, rank: Rank | None = None) -> None:
    """Log where torch computes; on the CPU also why, if nobody asked for it."""
    if device.type != "cpu":
        log.info("computing on %s", title_of(device))
        return
    why = obstacle(rank) if name == AUTO else ""
    log.info("computing on the CPU%s", f": {why}" if why else "")


def local_ranks() -> int | None:
    """How many ranks the launcher started on this machine; None if it does not say."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(count) if count.isdecimal() else None


@contextmanager
def placed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """`model` on `device` within the block, on the CPU again behind it. Blocks do not nest."""
    if device.type == "cpu":
        yield
        return
    with computing_on(device):
        try:
            with torch.inference_mode(False):  # weights that are moved within it could not be trained any more
                model.to(device)  # of which half is there if the memory does not suffice
            yield
        finally:
            with torch.inference_mode(False):
                model.to("cpu")


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """A block of work on a device: it is the current one, float32 is float32 (a GPU's convolutions round to TF32 otherwise), and
    of two kernels the one is taken that adds up in the same order every time."""
    if device.type != "cuda":
        yield
        return
    cudnn, conv, matmul = torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    # each is set back to what it was: PyTorch refuses to mix its old and new precision switches
    before = (conv.fp32_precision, matmul.fp32_precision, cudnn.benchmark, cudnn.deterministic)
    conv.fp32_precision, matmul.fp32_precision, cudnn.benchmark, cudnn.deterministic = "ieee", "ieee", False, True
    try:
        with torch.cuda.device(device):
            yield
    finally:
        conv.fp32_precision, matmul.fp32_precision, cudnn.benchmark, cudnn.deterministic = before
