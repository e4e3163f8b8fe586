"""What a command says of its memory and disk before the work, and how it refuses where they are not there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from moee.cures import cures
from moee.errors import MissingDependency, UserError
from moee.space.estimate import FLOAT, Need
from moee.space.limits import USUAL, Limits
from moee.space.machine import available_memory, free_disk

log = logging.getLogger("moee")
LIBRARIES = 1 << 30  # bytes that Python, PyTorch, timm, scikit-learn and ONNX Runtime take once they are loaded
SLACK = 1.5  # times the memory that is free, up to which an estimate may be too high, and is only warned of
STEP = 0.9  # of a refit's tokens that are tried next
MACHINE = "a machine that has it"
CURES: dict[str, tuple[str, ...]] = {
    "calibration": ("fewer images", "a smaller --img-size"), "clustering": ("fewer --cluster-tokens",),
    "sensitivity": ("fewer --sensitivity-tokens", "--criterion output_variance and --neurons ranked"),
    "statistics": ("fewer --jobs",),
    "refit": ("fewer --refit-tokens",), "comparison": ("fewer --tokens",), "measurement": ("fewer held-out images",),
    "narrower heads": ("fewer --attention-tokens",), "solution": ("fewer --tokens",),
    "decomposition": ("fewer --calibration-images",), "fine-tuning": ("more --accumulate", "--checkpointing", "--train experts"),
    "export": (MACHINE,), "trial export": ("--no-trial-export",),
}  # fmt: skip

TOKENS = "the calibration's tokens"
FILES = {"calibration": TOKENS, "decomposition": TOKENS, "export": "the graphs"}
SCRATCH, TEMPORARY = ("a larger disk with --scratch DIR", "fewer --tokens"), "a larger disk with TMPDIR=DIR"
PLACES = {"calibration": SCRATCH, "decomposition": SCRATCH, "export": ("an --out on a larger disk",)}


def in_words(size_bytes: int) -> str:
    """Bytes as people read them."""
    if size_bytes >= 1 << 30:
        return f"{size_bytes / 2**30:.1f} GiB"
    return f"{-(-size_bytes >> 20)} MiB" if size_bytes >= 1 << 20 else f"{-(-size_bytes >> 10)} KiB"


def worst(needs: Sequence[Need]) -> Need:
    """The stage that takes the most memory."""
    return max(needs, key=lambda need: need.memory_bytes)


def loaded(weights: int) -> int:
    """Bytes of the process before the work: libraries, and a model of so many `weights`."""
    return LIBRARIES + FLOAT * weights


def limits_within(memory: int, weights: int, needs: Callable[[Limits], Sequence[Need]], refitted: int, least: int) -> Limits:
    """The largest pieces with which every stage of a model of so many `weights` stays within `memory` bytes, or the smallest.
    The refit keeps `least` of its `refitted` tokens. By shapes alone: the same command cuts its work the same way again."""
    limits = USUAL
    while (most := worst(needs(limits))).memory_bytes > memory - loaded(weights):
        smaller = _smaller(limits, most.stage, refitted, least)
        if smaller == limits:
            break
        limits = smaller
    return limits


def _smaller(limits: Limits, stage: str, refitted: int, least: int) -> Limits:
    """Smaller pieces of a stage; the same where they are the smallest."""
    if stage in ("calibration", "measurement"):
        return replace(limits, forward=max(1, limits.forward // 2))
    if stage == "sensitivity":
        return replace(limits, backward=max(1, limits.backward // 2))
    if stage in ("clustering", "statistics"):
        return replace(limits, jobs=1)
    if stage == "refit":
        return replace(limits, refit_tokens=max(min(refitted, least), int(STEP * limits.refitted(refitted))))
    return limits


def refuse_without_space(
    needs: Sequence[Need], weights: int, memory: int | None = None, folder: Path | str | None = None
) -> None:
    """Raise `UserError` unless what the stages need is within the bound `memory` that a user gave, and `MissingDependency` unless
    it is there, on this machine and below the `folder` of files. The model of so many `weights` is loaded already. What a system
    does not tell refuses nothing."""
    most, disk = worst(needs), sum(need.disk_bytes for need in needs)
    ways = CURES[most.stage]
    if memory is not None and loaded(weights) + most.memory_bytes > memory:
        raise UserError(
            f"the {most.stage} takes about {in_words(most.memory_bytes)} in the smallest pieces, beside "
            f"{in_words(loaded(weights))} of libraries and weights, and --memory allows {in_words(memory)}; give "
            f"{cures('a larger --memory', *ways)}"
        )
    there = available_memory()
    if there is not None and most.memory_bytes > there.size_bytes:
        smaller = () if memory is not None or "export" in most.stage else ("--memory with what there is",)
        sentence = (
            f"the {most.stage} takes about {in_words(most.memory_bytes)} of memory beside the model, and "
            f"{in_words(there.size_bytes)} are {there.limit}; give {cures(*smaller, *ways, elsewhere=MACHINE)}"
        )
        if most.memory_bytes > SLACK * there.size_bytes:
            raise MissingDependency(sentence)
        log.warning("memory may not suffice: %s", sentence)
    free = free_disk(folder) if folder is not None and disk else None
    if free is not None and disk > free:
        stage = next(need.stage for need in needs if need.disk_bytes)
        raise MissingDependency(
            f"{FILES[stage]} take {in_words(disk)} in {folder}, and {in_words(free)} are free there; give "
            f"{cures(*PLACES[stage], elsewhere=TEMPORARY)}"
        )


def say_space(needs: Sequence[Need], weights: int, folder: Path | str | None = None, beside: str = "") -> None:
    """Log what the stages will take at their peak, where their files lie, and what stands `beside` it without an estimate."""
    most, disk = worst(needs), sum(need.disk_bytes for need in needs)
    where = f"; disk: {in_words(disk)} in {folder}" if disk and folder is not None else ""
    where += f"; {beside}" if beside else ""
    log.info("memory: about %s at the peak (%s)%s", in_words(loaded(weights) + most.memory_bytes), most.stage, where)
