"""The CLEAR-MoE layer in a manifest (`moee.layers.clear.ClearFFN`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from moee.errors import UserError
from moee.kinds.kind import Bypassed, LayerKind, LayerRecord, refuse_gated
from moee.layers.clear import ClearFFN, ClearParts
from moee.layers.clear_dispatch import Factors
from moee.layers.clear_routers import Router
from moee.models.ffn import FFN


class ClearRecord(LayerRecord):
    """A CLEAR-MoE layer as the manifest describes it; `ranks` are (up, up residual, down, down residual)."""

    kind: Literal["clear-moe"]
    experts: int = Field(ge=1)
    ranks: tuple[int, int, int, int]
    router_width: int = Field(ge=1)
    router_hidden: int = Field(ge=0)
    dim: int = Field(ge=1)
    hidden: int = Field(ge=1)
    channels_first: bool = False
    bypassed: Bypassed = ()


class ClearKind(LayerKind[ClearRecord, ClearFFN]):
    name, module, record = "clear-moe", ClearFFN, ClearRecord

    def describe(self, name: str, layer: ClearFFN) -> ClearRecord:
        return ClearRecord(
            kind="clear-moe", name=name, activation=layer.activation, experts=layer.num_experts, ranks=layer.ranks,
            router_width=layer.router.shape[1], router_hidden=len(layer.router_hidden), dim=layer.dim, hidden=layer.hidden,
            channels_first=layer.channels_first, bypassed=layer.bypassed,
        )  # fmt: skip

    def shapes(self, record: ClearRecord) -> dict[str, tuple[int, ...]]:
        k, d, h = record.experts, record.dim, record.hidden
        r1, q1, r2, q2 = record.ranks
        up, down = r1 + k * q1, r2 + k * q2
        return {
            "router": (k, record.router_width), "router_bias": (k,), "router_hidden": (record.router_hidden, d),
            "router_hidden_bias": (record.router_hidden,), "up_in": (up, d), "up_out": (up, h), "up_bias": (k, h),
            "down_in": (down, h), "down_out": (down, d), "down_bias": (k, d),
        }  # fmt: skip

    def check(self, record: ClearRecord, ffn: FFN) -> None:
        refuse_gated(record, ffn)
        if (record.dim, record.hidden) != (ffn.dim, ffn.hidden) or min(record.ranks) < 0:
            came = f"dim {record.dim}, hidden {record.hidden}, ranks {list(record.ranks)}"
            raise UserError(f"layer {record.name}: manifest says {came}; the model has {ffn.dim} and {ffn.hidden}")

    def build(self, record: ClearRecord, tensors: Mapping[str, Any]) -> ClearFFN:
        if record.router_width != (record.router_hidden or record.dim):
            raise UserError(f"layer {record.name}: the router's rows do not fit its features; the artifact is damaged")
        r1, q1, r2, q2 = record.ranks
        parts = ClearParts(
            Router(*(tensors[name] for name in ("router", "router_bias", "router_hidden", "router_hidden_bias"))),
            Factors(tensors["up_in"], tensors["up_out"], tensors["up_bias"], r1, q1),
            Factors(tensors["down_in"], tensors["down_out"], tensors["down_bias"], r2, q2),
            record.activation,
        )
        return ClearFFN(parts, record.channels_first)
