"""Ranks as threads of one process, which talk by queues. For logic; `test_distributed.py` has processes."""

from __future__ import annotations

import json
import queue
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from moee.parallel.group import Group, Parcel

LIMIT_S = 60.0


@dataclass(frozen=True)
class ThreadRank(Group):
    """`wires`: a queue from each rank to each."""

    wires: Any = None

    def all_json(self, value: Any) -> list[Any]:
        for to in range(self.world):
            self.wires[self.rank, to].put(json.dumps(value))
        return [json.loads(self.wires[source, self.rank].get(timeout=LIMIT_S)) for source in range(self.world)]

    def send(self, parcel: Parcel, to: int) -> None:
        copies = {name: tensor.detach().clone() for name, tensor in parcel.tensors.items()}
        self.wires[self.rank, to].put(Parcel(json.loads(json.dumps(parcel.body)), copies))

    def receive(self, source: int) -> Parcel:
        return self.wires[source, self.rank].get(timeout=LIMIT_S)

    def broadcast(self, parcel: Parcel | None, source: int = 0) -> Parcel:
        if self.rank != source:
            return self.receive(source)
        assert parcel is not None
        for to in range(self.world):
            if to != source:
                self.send(parcel, to)
        return parcel


def on_ranks(world: int, work: Callable[[Group], Any]) -> list[Any]:
    """What `work` gives on each of so many ranks, or the error that it raises there."""
    wires: Any = defaultdict(queue.Queue)
    for pair in ((a, b) for a in range(world) for b in range(world)):
        wires[pair]  # made before the threads are

    @torch.no_grad()
    def run(rank: int) -> Any:
        try:
            return work(ThreadRank(rank, world, wires=wires))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))
