"""The processes of one `torchrun` as a group: who this one is, and what they tell each other.

Collective operations are torch.distributed's, gloo for tensors on the CPU and nccl for those on a GPU. What travels is a
`Parcel`, JSON and tensors; torch's own `*_object` functions are not used, because they pickle.

Every function that takes a `group` works alone with the default, `SOLO`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moee import errors
from moee.errors import RankLost, StepFailed
from moee.parallel.devices import placed
from moee.parallel.lifeline import Lifeline

PIECE = 1 << 28  # bytes a message


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
            with self.lifeline.waiting() if self.lifeline is not None else nullcontext():
                operation(*args, **kwargs)
        except RuntimeError as error:
            if self.lifeline is not None and self.lifeline.lost(wait_s=2.0):
                raise RankLost(self.lifeline.reason, self.lifeline.speaks) from error
            reason = str(error).splitlines()[0]
            hint = "; a rank hangs, or needs a longer --rank-timeout" if "imed out" in reason or "imeout" in reason else ""
            raise StepFailed(f"rank {self.rank} of {self.world} lost touch with the others: {reason}{hint}") from error

    def placed(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """`model` on this rank's device within the block, on the CPU again behind it."""
        return placed(model, self.device)

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
            known = isinstance(kind, type) and issubclass(kind, Exception) and kind is not RankLost
            if rank == self.rank and own is not None:
                shared: Exception = own
            elif known and kind is not None:
                shared = kind(verdict[1])
            else:
                shared = StepFailed(f"rank {rank} of {self.world} failed: {': '.join(verdict)}")
            if known or rank != self.rank:  # a bug shows its traceback where it happened
                setattr(shared, "agreed", True)  # noqa: B010
            raise shared


SOLO = Group()
