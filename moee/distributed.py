"""The processes of one `torchrun` as a group: who this one is, and what they tell each other.

Collective operations are torch.distributed's, gloo for tensors on the CPU and nccl for those on a GPU. What travels is a
`Parcel`, JSON and tensors; torch's own `*_object` functions are not used, because they pickle.

Every function that takes a `group` works alone with the default, `SOLO`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moee import errors
from moee.errors import RankLost, StepFailed, UserError
from moee.lifeline import Lifeline, Offer, connect

TIMEOUT_S = 3600.0  # a rank may wait as long as another one clusters a layer
JOIN_S = 300.0  # all ranks have to be there by then
PIECE = 1 << 28  # bytes a message
LEADER_SPEAKS_S = 5.0
T = TypeVar("T")


class Parcel(NamedTuple):
    """What one rank sends another: JSON and tensors by name."""

    body: Any = None
    tensors: Mapping[str, Tensor] = {}


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _json(raw: Tensor) -> Any:
    return json.loads(raw.numpy().tobytes())


def _memory_order(tensor: Tensor) -> list[int]:
    """Dimensions from the slowest in memory to the fastest."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda i: (-strides[i], i))


@dataclass(frozen=True)
class Group:
    """This process among `world`: its `rank`, its rank on its own machine, and the device it computes on."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lifeline: Lifeline | None = None
    ranks: dist.ProcessGroup | None = None

    @property
    def leader(self) -> bool:
        """Rank 0: it alone reports progress and writes artifacts."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    def part(self, count: int, batch_size: int = 1) -> range:
        """This rank's contiguous share of `count` items, cut between the batches that one rank alone would make of them."""
        steps = -(-count // batch_size)
        low, high = (steps * r // self.world * batch_size for r in (self.rank, self.rank + 1))
        return range(min(low, count), min(high, count))

    def barrier(self) -> None:
        """Wait for all ranks. Raises `StepFailed` after the group's timeout, `RankLost` if one is gone."""
        if not self.alone:
            self._run(dist.barrier, group=self.ranks)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over the ranks, on every rank; in place."""
        if not self.alone:
            self._run(dist.all_reduce, values, group=self.ranks)
        return values

    def all_json(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in rank order, on every rank. For small ones."""
        if self.alone:
            return [value]
        raw = _bytes(value)
        lengths = self.sum(torch.zeros(self.world, dtype=torch.int64).index_fill_(0, torch.tensor(self.rank), len(raw)))
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(raw)] = raw
        found = [torch.empty_like(padded) for _ in range(self.world)]
        self._run(dist.all_gather, found, padded, group=self.ranks)
        return [_json(item[: int(n)]) for item, n in zip(found, lengths, strict=True)]

    def broadcast(self, parcel: Parcel | None, source: int = 0) -> Parcel:
        """`source`'s parcel on every rank; the other ranks' argument is ignored."""
        if self.alone:
            assert parcel is not None
            return parcel
        own = parcel if self.rank == source else None
        return self._move(own, lambda t: self._run(dist.broadcast, t, source, group=self.ranks))

    def send(self, parcel: Parcel, to: int) -> None:
        """Hand a parcel to rank `to`, which must `receive` it."""
        self._move(parcel, lambda t: self._run(dist.send, t, to, group=self.ranks))

    def receive(self, source: int) -> Parcel:
        """The parcel that rank `source` sends here."""
        return self._move(None, lambda t: self._run(dist.recv, t, source, group=self.ranks))

    def gather(self, parcel: Parcel, to: int = 0) -> list[Parcel]:
        """The parcels of all ranks in rank order on rank `to`, nothing elsewhere. They arrive one after another."""
        if self.rank == to:
            return [parcel if r == to else self.receive(r) for r in range(self.world)]
        self.send(parcel, to)
        return []

    def _move(self, parcel: Parcel | None, transfer: Callable[[Tensor], Any]) -> Parcel:
        """Length, header, then each tensor in pieces: written by the rank that has the parcel, filled in on the others."""
        head = torch.empty(0, dtype=torch.uint8)
        if parcel is not None:
            tensors = {name: t.detach().cpu() for name, t in parcel.tensors.items()}
            orders = {name: _memory_order(t) for name, t in tensors.items()}
            tensors = {name: t.permute(orders[name]).contiguous() for name, t in tensors.items()}
            specs = [[name, str(t.dtype).removeprefix("torch."), list(t.shape), orders[name]] for name, t in tensors.items()]
            head = _bytes({"body": parcel.body, "tensors": specs})
        length = torch.tensor([len(head)])
        transfer(length)
        head = head if parcel is not None else torch.empty(int(length), dtype=torch.uint8)
        transfer(head)
        plan = _json(head)
        if parcel is None:
            tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape, _ in plan["tensors"]}
        for tensor in tensors.values():
            if tensor.numel():
                for piece in tensor.view(-1).view(torch.uint8).split(PIECE):
                    transfer(piece)
        # a transposed matrix arrives transposed: the order in memory decides the last bits of a product
        placed = {name: torch.as_tensor(order).argsort().tolist() for name, _, _, order in plan["tensors"]}
        return Parcel(plan["body"], {name: t.permute(placed[name]) for name, t in tensors.items()})

    def _run(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            operation(*args, **kwargs)
        except RuntimeError as error:
            if self.lifeline is not None and self.lifeline.lost(wait_s=2.0):
                raise RankLost(self.lifeline.reason, self.lifeline.speaks) from error
            reason = str(error).splitlines()[0]
            hint = "; a rank hangs, or needs a longer --rank-timeout" if "imed out" in reason or "imeout" in reason else ""
            raise StepFailed(f"rank {self.rank} of {self.world} lost touch with the others: {reason}{hint}") from error

    @contextmanager
    def placed(self, model: torch.nn.Module) -> Iterator[None]:
        """`model` on this rank's device within the block, on the CPU again behind it."""
        if self.device.type == "cpu":
            yield
            return
        model.to(self.device)
        try:
            yield
        finally:
            model.to("cpu")

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A block without collective operations that all ranks run: an error in it on one rank becomes one on every rank."""
        if self.alone:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:  # every kind, or the others would wait for this rank
            own = error
        told = [None if own is None else [type(own).__name__, str(own)]]
        for rank, (verdict,) in enumerate(self.all_json(told)):
            if verdict is None:
                continue
            kind = getattr(errors, verdict[0], None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or kind is RankLost:
                if rank == self.rank and own is not None:
                    raise own
                kind, verdict = StepFailed, ["", f"rank {rank} of {self.world} failed: {': '.join(verdict)}"]
            shared = kind(verdict[1])
            setattr(shared, "agreed", True)  # noqa: B010
            raise shared from own

    def from_leader(self, make: Callable[[], T], pack: Callable[[T], Parcel], unpack: Callable[[Parcel], T]) -> T:
        """What rank 0 makes, on every rank; its errors are every rank's."""
        made: list[T] = []
        with self.agreed():
            if self.leader:
                made.append(make())
        if self.alone:
            return made[0]
        parcel = self.broadcast(pack(made[0]) if made else None)
        return made[0] if made else unpack(parcel)


SOLO = Group()


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


@contextmanager
def joined(timeout_s: float = TIMEOUT_S, threads: int | None = None) -> Iterator[Group]:
    """The group of the ranks that torchrun started, `SOLO` in a process of its own.

    `threads` a rank: the last bits of a matrix product depend on their number, so it does not depend on the number of ranks
    (default under torchrun: OMP_NUM_THREADS, else 1). Raises `RankLost` or `StepFailed` when the group falls apart.
    """
    place = launched()
    before = torch.get_num_threads()
    if threads is not None or place is not None:
        torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS") or 1))
    try:
        if place is None:
            yield SOLO
        else:
            with _ranked(place, timeout_s) as group:
                yield group
    finally:
        torch.set_num_threads(before)


@contextmanager
def _ranked(place: tuple[int, int, int], timeout_s: float) -> Iterator[Group]:
    rank, world, local = place
    device = torch.device("cuda", local) if torch.cuda.is_available() and dist.is_nccl_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Group(device=device)
        return
    group = _assembled(rank, world, local, device, timeout_s)
    line = group.lifeline
    assert line is not None
    try:
        yield group
    except BaseException as error:
        # gloo may notice a dead rank before its lifeline does
        reason = line.lost(wait_s=2.0 if isinstance(error, RuntimeError) and not isinstance(error, StepFailed) else 0.0)
        line.acknowledge()
        if reason:
            raise RankLost(reason, line.speaks) from error
        if getattr(error, "agreed", False):
            line.await_leader(LEADER_SPEAKS_S)  # every rank has this error: rank 0 says it before torchrun ends the rest
        elif isinstance(error, (UserError, StepFailed, errors.MissingDependency)):
            error.speaks = True  # type: ignore[union-attr]
        raise
    group.barrier()
    line.close()
    dist.destroy_process_group()


def _assembled(rank: int, world: int, local: int, device: torch.device, timeout_s: float) -> Group:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        # the default group's timeout is that of joining too, so the long one belongs to a group of its own
        dist.init_process_group(backend, timeout=timedelta(seconds=min(JOIN_S, timeout_s)))
        ranks = dist.new_group(timeout=timedelta(seconds=timeout_s), backend=backend)
        assert isinstance(ranks, dist.ProcessGroup), "this rank is in the group of all ranks"
    except (RuntimeError, ValueError) as error:
        raise StepFailed(f"rank {rank} of {world} could not join the others: {str(error).splitlines()[0]}") from error
    bare = Group(rank, world, local, device, ranks=ranks)
    offer = Offer() if bare.leader else None
    told = bare.broadcast(Parcel({"port": offer.port, "token": offer.token}) if offer is not None else None).body
    peers = offer.accept(world) if offer is not None else connect(os.environ["MASTER_ADDR"], rank=rank, **told)
    return replace(bare, lifeline=Lifeline(rank, world, local, peers))
