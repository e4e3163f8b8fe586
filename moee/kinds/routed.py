"""The routed FFN in a manifest: experts that are lists of neurons of one store (`moee.layers.routed.RoutedFFN`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from moee.errors import UserError
from moee.kinds.kind import Bypassed, LayerKind, LayerRecord, refuse_gated
from moee.layers.routed import LOAD_UNIT, Experts, RoutedFFN
from moee.models.ffn import FFN


class RoutedRecord(LayerRecord):
    """A routed FFN as the manifest describes it. Manifests do not name its kind: it was the first."""

    top_k: int = Field(ge=1)
    experts: int = Field(ge=1)
    union: int = Field(ge=1)
    neurons: int = Field(ge=1)
    dim: int = Field(ge=1)
    load: tuple[Annotated[int, Field(ge=0, le=LOAD_UNIT)], ...]
    channels_first: bool = False
    bypassed: Bypassed = ()


class RoutedKind(LayerKind[RoutedRecord, RoutedFFN]):
    name, module, record = "moee", RoutedFFN, RoutedRecord

    def describe(self, name: str, layer: RoutedFFN) -> RoutedRecord:
        return RoutedRecord(
            name=name, activation=layer.activation, top_k=layer.top_k, experts=layer.num_experts, union=layer.union,
            neurons=len(layer.neurons), dim=layer.w_up.shape[1], load=layer.load, channels_first=layer.channels_first,
            bypassed=layer.bypassed,
        )  # fmt: skip

    def shapes(self, record: RoutedRecord) -> dict[str, tuple[int, ...]]:
        k, d, u = record.experts, record.dim, record.union
        return {
            "router": (k, d), "router_bias": (k,), "w_up": (u, d), "b_up": (u,), "w_down": (u, d), "b_out": (k, d),
            "neurons": (record.neurons,), "offsets": (k + 1,),
        }  # fmt: skip

    def check(self, record: RoutedRecord, ffn: FFN) -> None:
        refuse_gated(record, ffn)
        if record.dim != ffn.dim or record.union > ffn.hidden:
            came = f"dim {record.dim}, union {record.union}"
            raise UserError(f"layer {record.name}: manifest says {came}; the model has {ffn.dim} and {ffn.hidden}")

    def build(self, record: RoutedRecord, tensors: Mapping[str, Any]) -> RoutedFFN:
        if record.top_k > record.experts:
            raise UserError(
                f"layer {record.name}: top_k {record.top_k} exceeds its {record.experts} experts; the artifact is damaged"
            )
        if record.load and len(record.load) != record.experts:
            raise UserError(
                f"layer {record.name}: load of {len(record.load)} experts, it has {record.experts}; the artifact is damaged"
            )
        experts = Experts(**tensors, activation=record.activation, top_k=record.top_k, load=record.load)
        return RoutedFFN(experts, record.channels_first)
