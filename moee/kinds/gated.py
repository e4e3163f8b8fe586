"""The pruned gated MLP in a manifest (`moee.mlps.gated.GatedFFN`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, StrictInt

from moee.errors import UserError
from moee.kinds.kind import LayerKind, LayerRecord
from moee.mlps.gated import GATES, GatedFFN, GatedWeights, weight_shapes
from moee.models.ffn import FFN
from moee.schema import shown


class GatedRecord(LayerRecord):
    """A pruned gated MLP as the manifest describes it; `width` hidden neurons stay. It is one module."""

    kind: Literal["gated"]
    width: StrictInt = Field(ge=1)
    dim: StrictInt = Field(ge=1)
    channels_first: bool = False


class GatedKind(LayerKind[GatedRecord, GatedFFN]):
    name, module, record = "gated", GatedFFN, GatedRecord

    def describe(self, name: str, layer: GatedFFN) -> GatedRecord:
        return GatedRecord(
            kind="gated", name=name, activation=layer.activation, width=layer.union, dim=layer.w_up.shape[1],
            channels_first=layer.channels_first,
        )  # fmt: skip

    def shapes(self, record: GatedRecord) -> dict[str, tuple[int, ...]]:
        return weight_shapes(record.dim, record.width)

    def check(self, record: GatedRecord, ffn: FFN) -> None:
        if not ffn.gated:
            raise UserError(f"layer {record.name}: the manifest says that it is gated; the model's MLP is not")
        if record.dim != ffn.dim or record.width > ffn.hidden or record.channels_first != ffn.channels_first:
            came = f"dim {record.dim}, width {record.width}"
            raise UserError(f"layer {record.name}: manifest says {came}; the model has {ffn.dim} and {ffn.hidden}")
        if record.activation not in GATES:
            raise UserError(
                f"layer {record.name}: unknown activation {shown(record.activation)}; expected one of {', '.join(GATES)}"
            )

    def build(self, record: GatedRecord, tensors: Mapping[str, Any]) -> GatedFFN:
        return GatedFFN(GatedWeights(**tensors), record.activation, record.channels_first)
