"""What came of compiling candidates: one JSON line each, kept in a file that a later run goes on from."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from moee.errors import UserError
from plugins.aot.build import compile_apart, key
from plugins.aot.compile import GateError, check_gates
from plugins.aot.manifest import Count, Entry, Name, Size
from plugins.aot.pool import FreshProcesses
from plugins.aot.search.candidates import Group
from plugins.aot.search.model import Tile, tile
from plugins.tactics import Config
from plugins.targets import target

Wanted = tuple[Group, Config]


class Trial(Entry):
    """One compiled candidate. `key` is of its source, settings and compilers; `reason` says why it was dropped, empty: it was
    not. Bytes, registers a thread."""

    key: Name
    label: Name
    reason: Annotated[str, Field(max_length=2000)]
    registers: Size = 0
    shared_bytes: Size = 0
    warps: Count = 4

    def tile(self, group: Group, settings: Config) -> Tile | None:
        """What the model takes; None for one that was dropped."""
        if self.reason:
            return None
        return tile(group.role, settings.block, self.warps, settings.num_stages, registers=self.registers,
                    shared_bytes=self.shared_bytes, sm=group.sm)  # fmt: skip


def label(settings: Config) -> str:
    """`16x64x64, 4 warps, 4 stages`: m, n and k of the tile."""
    block = settings.block
    return f"{block.m}x{block.n}x{block.k}, {settings.num_warps} warps, {settings.num_stages} stages"


@cache
def key_of(wanted: Wanted) -> str:
    """The key of the kernel cache, for these settings."""
    group, settings = wanted
    return key(group.job, settings)


def compile_trial(wanted: Wanted, name: str) -> Trial:
    """Compile one candidate. What spills, has a stack, exceeds shared memory, lacks tensor cores or does not compile is dropped,
    with the reason. A full disk or too little memory is no property of a candidate and is raised."""
    group, settings = wanted
    text = f"sm_{group.sm} {group.role} {group.variant} {group.dtype}: {label(settings)}"
    try:
        kernel = compile_apart(group.job, settings, gates=False).kernel
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the compiler's own failures have many classes
        words = " ".join(f"does not compile: {type(error).__name__}: {error}".split())
        return Trial(key=name, label=text, reason=words[:300].encode("ascii", "replace").decode())
    try:
        check_gates(kernel, target(group.sm))
        reason = ""
    except GateError as error:
        reason = str(error)
    return Trial(key=name, label=text, reason=reason, registers=kernel.registers, shared_bytes=kernel.shared_bytes,
                 warps=kernel.num_warps)  # fmt: skip


class Trials:
    """The file of results. A line that a killed run left unfinished is cut off; `UserError` for a file of anything else."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+", encoding="utf-8") as file:  # refuses before the work what could not be written after it
                file.seek(0)
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read and written ({error}); pass another --results") from None
        whole, _, rest = text.rpartition("\n")
        lines = whole.splitlines()
        try:
            trials = [Trial.model_validate_json(line) for line in lines]
        except ValidationError:
            raise UserError(f"{path} is no file of this search; pass another --results") from None
        if rest and not rest.startswith('{"key":'):
            raise UserError(f"{path} is no file of this search; pass another --results")
        self.known = {trial.key: trial for trial in trials}
        if rest:
            os.truncate(path, len(text.encode()) - len(rest.encode()))

    def get(self, wanted: Wanted) -> Trial | None:
        """The result for these sources and compilers, if there is one."""
        return self.known.get(key_of(wanted))

    def add(self, trial: Trial) -> None:
        """Keep one result, in the file too."""
        self.known[trial.key] = trial
        with self.path.open("a", encoding="utf-8") as file:
            file.write(trial.model_dump_json() + "\n")


def compiled(pool: ProcessPoolExecutor | None, wanted: Sequence[Wanted], until: float) -> Iterator[Trial]:
    """Results of candidates as they come; what has not begun at `until` (`time.monotonic`) is left out."""
    if pool is None:
        for each in wanted:
            if time.monotonic() >= until:
                return
            yield compile_trial(each, key_of(each))
        return
    futures = [pool.submit(compile_trial, each, key_of(each)) for each in wanted]
    try:
        for future in as_completed(futures):
            if not future.cancelled():
                yield future.result()
            if time.monotonic() >= until:
                for other in futures:
                    other.cancel()
    finally:
        for other in futures:
            other.cancel()


def workers(count: int) -> ProcessPoolExecutor | None:
    """Processes of their own; None for one worker, which is this process."""
    return None if count == 1 else FreshProcesses(count)
