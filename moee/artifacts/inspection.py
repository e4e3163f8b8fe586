"""What a model costs and how its experts are used, layer by layer: the figures behind `moee inspect`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from moee.artifacts.model import MoeeModel
from moee.artifacts.stages import latest
from moee.data.transform import model_transform
from moee.interface.adapted import on_meta
from moee.layers.report import routing_entropy
from moee.layers.routed import routed_layers
from moee.measure.metrics import dense_macs, dense_params, model_cost, tokens_per_image
from moee.mlps.attention import narrowing_costs
from moee.mlps.find import find_ffns
from moee.models.ffn import FFN, plain_size
from moee.models.model import ModelSpec, Shape, build_model
from moee.tokens.block import merged_tokens, merging_like


@dataclass(frozen=True)
class LayerFigures:
    """One MLP. `tokens` an image that come to it, `merged` fewer than before any were merged. `macs` per image; `balance` is the
    largest share times the experts (1: even), `entropy` of the routing relative to its maximum (1: even). Both are None for a
    dense layer. `gated`: a gated MLP, of which there are no experts."""

    name: str
    tokens: int
    hidden: int
    macs: int
    params: int
    dense_macs: int
    dense_params: int
    experts: int = 0
    union: int = 0
    min_width: int = 0
    mean_width: float = 0.0
    max_width: int = 0
    balance: float | None = None
    entropy: float | None = None
    gated: bool = False
    merged: int = 0


@dataclass(frozen=True)
class AttentionFigures:
    """One narrowed attention: dimensions a head before and after (query and key, values), MACs an image."""

    name: str
    heads: int
    head_dim: int
    qk: int
    v: int
    macs: int
    dense_macs: int


@dataclass(frozen=True)
class Inspection:
    """`dense` and `moee` hold {"macs", "params"}; `moee` is None for a dense model. `attention` lists what was narrowed,
    `uncut` what looks like an MLP but cannot be cut, with the reason, `merged_tokens` how many each block merges, if any do."""

    model: str
    shape: Shape
    dense: dict[str, int]
    moee: dict[str, int] | None
    layers: list[LayerFigures]
    attention: list[AttentionFigures] = field(default_factory=list)
    uncut: dict[str, str] = field(default_factory=dict)
    merged_tokens: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        body = asdict(self)
        channels, *_ = body.pop("shape")
        return {"schema": "moee.inspect/1", **body, "size": plain_size(self.shape), "channels": channels}


def _ffn_cost(ffn: FFN, tokens: int) -> tuple[int, int]:
    return tokens * ffn.macs, ffn.params


def inspect_dense(spec: ModelSpec) -> Inspection:
    """Figures of a timm model by its shapes alone: no weights are loaded, no memory is taken."""
    with torch.device("meta"):
        model = build_model(spec)
    shape = model_transform(model).shape
    ffns, uncut = _mlps(model, shape)
    layers = [LayerFigures(f.name, n, f.hidden, *_ffn_cost(f, n), *_ffn_cost(f, n), gated=f.gated) for f, n in ffns]
    cost = {"macs": dense_macs(model, shape), "params": dense_params(model)}
    return Inspection(spec.name, shape, cost, None, layers, uncut=uncut)


def _mlps(model: nn.Module, shape: Shape) -> tuple[list[tuple[FFN, int]], dict[str, str]]:
    """The MLPs of a model with their tokens an image, and the reasons of what is none, by shapes alone."""
    found = find_ffns(on_meta(model), shape=shape, gated=True)
    tokens = tokens_per_image(model, [f.name for f in found.ffns], shape)
    return [(f, tokens[f.name]) for f in found.ffns], {name: part.reason for name, part in found.dense.items()}


def inspect_artifact(moee: MoeeModel) -> Inspection:
    """Figures of an extracted or tuned model; shares are those measured on its held-out images."""
    dense = moee.layout()
    shape = model_transform(dense).shape
    shares = latest(moee.info).get("shares", {})
    routed = routed_layers(moee.model)
    for name, layer in routed.items():
        shares.setdefault(name, [1 / layer.num_experts] * layer.num_experts)
    layers = []
    ffns, uncut = _mlps(dense, shape)
    left = tokens_per_image(merging_like(dense, moee.model), [ffn.name for ffn, _ in ffns], shape)
    for ffn, before in ffns:
        tokens = left[ffn.name]
        macs, params = _ffn_cost(ffn, before)
        facts: dict[str, Any] = {"gated": ffn.gated, "merged": before - tokens}
        if ffn.name not in routed:
            layers.append(LayerFigures(ffn.name, tokens, ffn.hidden, tokens * ffn.macs, params, macs, params, **facts))
            continue
        layer, share = routed[ffn.name], shares[ffn.name]
        widths = layer.widths
        layers.append(
            LayerFigures(
                ffn.name, tokens, ffn.hidden, round(tokens * layer.macs_per_token(share)),
                layer.stored_numbers(), macs, params,
                experts=layer.num_experts, union=layer.union, min_width=min(widths),
                mean_width=sum(w * s for w, s in zip(widths, share, strict=True)), max_width=max(widths),
                balance=max(share) * len(share), entropy=routing_entropy(share), **facts,
            )  # fmt: skip
        )
    cost = model_cost(dense, moee.model, shares, shape)
    attention = attention_figures(moee.model, dense, shape)
    return Inspection(moee.spec.name, shape, cost["dense"], cost["moee"], layers, attention, uncut, merged_tokens(moee.model))


def attention_figures(model: nn.Module, dense: nn.Module, shape: Shape) -> list[AttentionFigures]:
    """The narrowed attentions of `model`, on the tokens that its merging leaves."""
    merging = merging_like(dense, model)
    return [
        AttentionFigures(name, layer.heads, layer.head_dim, layer.widths.qk, layer.widths.v, now, before)
        for name, (layer, before, now) in narrowing_costs(model, merging, shape).items()
    ]
