"""Joining the group of ranks that torchrun started, and leaving it, in good order or not."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moee.errors import RankLost, StepFailed, UserError
from moee.parallel.devices import AUTO, Rank, chosen_device, local_ranks, say_device
from moee.parallel.group import Group, Parcel
from moee.parallel.lifeline import Lifeline, Offer, connect
from moee.parallel.machine import affordable_threads

TIMEOUT_S = 3600.0  # without a rank that computes
FOREVER_S = 30 * 86400.0  # of a collective operation, where the lifelines tell whether somebody computes
JOIN_S = 300.0  # all ranks have to be there by then
LEADER_SPEAKS_S = 5.0
SPOKEN_S = 2.0  # before the ranks have met


def launched() -> tuple[int, int, int] | None:
    """Rank, world size and local rank that a launcher set in the environment; None outside of one.

    Raises `UserError` for an environment that is only half there.
    """
    found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    if found["RANK"] is None or found["WORLD_SIZE"] is None:
        return None
    try:
        rank, world, local = (int(found[name] or "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError:
        raise UserError("RANK and WORLD_SIZE are set but LOCAL_RANK is not a number; start the ranks with torchrun") from None
    if not 0 <= rank < world or (world > 1 and not (found["MASTER_ADDR"] and found["MASTER_PORT"])):
        raise UserError(f"RANK {rank}, WORLD_SIZE {world} and no MASTER_ADDR do not make a group; start the ranks with torchrun")
    return rank, world, local


def alone(device: str = AUTO, option: str = "--device") -> Group:
    """The group of one process, on the device of that name (`moee.parallel.devices.chosen_device`); logs which one it is."""
    affordable_threads()
    group = Group(device=chosen_device(device, option=option))
    say_device(group.device, device)
    return group


@contextmanager
def joined(timeout_s: float = TIMEOUT_S, threads: int | None = None, device: str = AUTO) -> Iterator[Group]:
    """The group of the ranks that torchrun started, or of a process of its own; the first rank logs its device.

    `device` by name, of each rank (`moee.parallel.devices.chosen_device`). `threads` a rank: the last bits of a matrix product
    depend on their number, so it does not depend on the number of ranks (default under torchrun: OMP_NUM_THREADS, else 1).
    Raises `UserError` for a device that is not there, `RankLost` or `StepFailed` when the group falls apart.
    """
    environment = launched()
    before = torch.get_num_threads()
    if threads is not None or environment is not None:
        torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS") or 1))
    try:
        if environment is None:
            yield alone(device)
        else:
            with _ranked(environment, timeout_s, device) as group:
                yield group
    finally:
        torch.set_num_threads(before)


@contextmanager
def _ranked(environment: tuple[int, int, int], timeout_s: float, name: str) -> Iterator[Group]:
    rank, world, local = environment
    place = Rank(world, local, local_ranks())
    with _said_once(speaks=local == 0 or place.neighbours is None):
        device = chosen_device(name, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # nccl takes the current one
    if rank == 0:
        say_device(device, name, place)
    if world == 1:
        yield Group(device=device)
        return
    group = _assembled(rank, world, local, device, timeout_s)
    line = group.lifeline
    assert line is not None
    try:
        yield group
        group.barrier()
    except BaseException as error:
        # gloo may notice a dead rank before its lifeline does
        try:
            reason = line.lost(wait_s=2.0 if isinstance(error, RuntimeError) and not isinstance(error, StepFailed) else 0.0)
        except KeyboardInterrupt:  # the lifeline's, which comes with the reason; or the user's
            reason = line.reason
        line.acknowledge()
        if reason:
            raise RankLost(reason, line.speaks) from error
        if getattr(error, "agreed", False):
            line.await_leader(LEADER_SPEAKS_S)  # every rank has this error: rank 0 says it before torchrun ends the rest
        elif isinstance(error, Exception):
            setattr(error, "speaks", True)  # noqa: B010 what only this rank has met
        raise
    line.close()
    dist.destroy_process_group()


@contextmanager
def _said_once(speaks: bool) -> Iterator[None]:
    """What all ranks of a machine refuse before they have met is said by one: the others wait, for torchrun ends all with the
    first."""
    try:
        yield
    except UserError as error:
        setattr(error, "speaks", speaks)  # noqa: B010
        if not speaks:
            time.sleep(SPOKEN_S)
        raise


def refuse_mixed(kinds: list[str]) -> None:
    """Raise `UserError`, on every rank, unless all compute on devices of one kind: `kinds` in rank order."""
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise UserError(f"rank 0 computes on {kinds[0]}, rank {rank} on {kind}; give --device cpu, or a GPU to every rank")


def _assembled(rank: int, world: int, local: int, device: torch.device, timeout_s: float) -> Group:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    def grouped(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (RuntimeError, ValueError) as error:
            raise StepFailed(f"rank {rank} of {world} could not join the others: {str(error).splitlines()[0]}") from error

    # the default group's timeout is that of joining; the work is done in a group of its own
    grouped(lambda: dist.init_process_group(backend, timeout=timedelta(seconds=JOIN_S)))
    bare = Group(rank, world, local, device)
    with _said_once(speaks=rank == 0):
        refuse_mixed(bare.all_json(device.type))
    offer = Offer() if bare.leader else None
    told = bare.broadcast(Parcel({"port": offer.port, "token": offer.token}) if offer is not None else None).body
    peers = offer.accept(world) if offer is not None else connect(os.environ["MASTER_ADDR"], rank=rank, **told)
    # without a connection nobody knows whether a rank works
    watched = all(bare.all_json(len(peers) == (world - 1 if bare.leader else 1)))
    waits = timedelta(seconds=FOREVER_S if watched else timeout_s)
    ranks = grouped(lambda: dist.new_group(timeout=waits, backend=backend))
    return replace(bare, lifeline=Lifeline(rank, world, local, peers, timeout_s if watched else math.inf), ranks=ranks)
