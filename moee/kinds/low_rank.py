"""The low-rank MLP in a manifest (`moee.layers.low_rank.LowRankFFN`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt

from moee.errors import UserError
from moee.kinds.kind import Bypassed, LayerKind, LayerRecord, refuse_gated
from moee.layers.low_rank import LowRankFFN, LowRankWeights, weight_shapes
from moee.models.ffn import FFN

Rank = Annotated[StrictInt, Field(ge=1)]


class LowRankRecord(LayerRecord):
    """A low-rank MLP as the manifest describes it; `ranks` are those of the up and the down map."""

    kind: Literal["lowrank"]
    ranks: tuple[Rank, Rank]
    dim: StrictInt = Field(ge=1)
    hidden: StrictInt = Field(ge=1)
    channels_first: bool = False
    bypassed: Bypassed = ()


class LowRankKind(LayerKind[LowRankRecord, LowRankFFN]):
    name, module, record = "lowrank", LowRankFFN, LowRankRecord

    def describe(self, name: str, layer: LowRankFFN) -> LowRankRecord:
        return LowRankRecord(
            kind="lowrank", name=name, activation=layer.activation, ranks=layer.ranks, dim=layer.dim, hidden=layer.hidden,
            channels_first=layer.channels_first, bypassed=layer.bypassed,
        )  # fmt: skip

    def shapes(self, record: LowRankRecord) -> dict[str, tuple[int, ...]]:
        return weight_shapes(record.dim, record.hidden, record.ranks)

    def check(self, record: LowRankRecord, ffn: FFN) -> None:
        refuse_gated(record, ffn)
        full = min(ffn.dim, ffn.hidden)
        if (record.dim, record.hidden) != (ffn.dim, ffn.hidden) or max(record.ranks) > full:
            came = f"dim {record.dim}, hidden {record.hidden}, ranks {list(record.ranks)}"
            raise UserError(f"layer {record.name}: manifest says {came}; the model has {ffn.dim} and {ffn.hidden}")

    def build(self, record: LowRankRecord, tensors: Mapping[str, Any]) -> LowRankFFN:
        return LowRankFFN(LowRankWeights(**tensors), record.activation, record.channels_first)
