"""Work that is cut into the same few parts for any number of ranks, and sums over the parts in their order.

So a sum has the same bits whoever has computed its parts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moee.parallel.group import SOLO, Group, Parcel

PARTS = 8  # of a step's images: as many ranks share it


def cut(count: int, most: int = PARTS) -> list[range]:
    """`count` items in at most `most` runs of neighbours, which differ in length by one at most. None is empty."""
    parts = min(count, max(1, most))
    return [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


class OrderedSum:
    """The sum over all ranks' parts, those of lower ranks first: each rank adds its own, then all ask for the `total`."""

    def __init__(self, group: Group = SOLO):
        self.group = group
        self.parts: list[dict[str, Tensor]] = []

    def add(self, part: Mapping[str, Tensor]) -> None:
        """The next part of this rank, which is this object's from now on. Every part has the same names and shapes."""
        if self.group.leader and self.parts:
            _add(self.parts[0], part)
        elif self.group.leader:
            self.parts.append(dict(part))
        else:  # what comes before it is not known yet
            self.parts.append({name: value.cpu() for name, value in part.items()})

    def total(self) -> dict[str, Tensor]:
        """The sum by name, on rank 0; nothing elsewhere, or where no rank has a part. All ranks call it."""
        group = self.group
        if group.alone:
            return self.parts[0] if self.parts else {}
        if group.leader:
            group.send(Parcel(None, self.parts[0] if self.parts else {}), 1)
            self.parts.clear()
            return dict(group.receive(group.world - 1).tensors)
        so_far = dict(group.receive(group.rank - 1).tensors)
        for part in self.parts:
            if so_far:
                _add(so_far, part)
            else:
                so_far = part
        self.parts = []
        group.send(Parcel(None, so_far), (group.rank + 1) % group.world)
        return {}


def _add(total: dict[str, Tensor], part: Mapping[str, Tensor]) -> None:
    for name, value in part.items():
        total[name] += value
