"""MACs, parameters and feature similarity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moee.interface.adapted import on_meta
from moee.interface.watch import shapes_given
from moee.layers.routed import routed_layers
from moee.mlps.attention import macs_saved
from moee.mlps.structure import read_mlp
from moee.models.model import Shape
from moee.tokens.block import merging_like, token_merges, without_merging
from moee.tokens.schedule import merges_cost

ROWS = 8192  # of features that are compared at once


def dense_macs(model: nn.Module, shape: Shape) -> int:
    """Multiply-accumulates of one image of `shape`, attention products included. Works on shapes alone."""
    shadow = on_meta(model)  # the counter expects gradients of parameters that need one
    for module in shadow.modules():
        if hasattr(module, "fused_attn"):  # fused attention hides its two products from the counter
            module.fused_attn = False  # type: ignore[assignment]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


def original_macs(model: nn.Module, shape: Shape) -> int:
    """`dense_macs` of a model as it was before its attention was narrowed and its tokens were merged."""
    plain = without_merging(model)
    return dense_macs(plain, shape) + macs_saved(plain, shape)


def saved_macs(model: nn.Module, shape: Shape) -> int:
    """Multiply-accumulates an image that narrower attention and merged tokens save; `model` has no routed layer yet."""
    return original_macs(model, shape) - dense_macs(model, shape)


def tokens_per_image(model: nn.Module, names: Iterable[str], shape: Shape) -> dict[str, int]:
    """Tokens an image that each named MLP sees."""
    def width(name: str) -> int:
        first = next(p for p in model.get_submodule(name).parameters() if p.dim() > 1)
        return first.shape[1]

    return {name: given.numel() // width(name) for name, given in shapes_given(model, names, shape).items()}


def dense_params(model: nn.Module) -> int:
    """Numbers in a model's parameters."""
    return sum(p.numel() for p in model.parameters())


def model_cost(dense: nn.Module, moee: nn.Module, shares: dict[str, list[float]], shape: Shape) -> dict[str, Any]:
    """MACs and parameters of both models: {"dense": {"macs", "params"}, "moee": {"macs", "params"}}.

    `shares` holds, per routed layer, each expert's measured share of the tokens. Parameters are those that the model holds, what
    several modules share counted once, and the floating-point buffers of routers. Neuron ids are indices and not counted; the
    maps to mean keys, by which tokens merge, are.
    """
    macs, params = dense_macs(dense, shape), dense_params(dense)
    layers = routed_layers(moee)
    merging = merging_like(dense, moee)
    tokens = tokens_per_image(merging, layers, shape)
    moee_macs = float(dense_macs(merging, shape) - macs_saved(moee, shape, merging))
    moee_params = dense_params(moee) + merges_cost(token_merges(moee))
    for name, layer in layers.items():
        ffn = read_mlp(dense, name, layer.bypassed)
        moee_macs += tokens[name] * (layer.macs_per_token(shares[name]) - float(ffn.macs))
        moee_params += layer.stored_numbers() - dense_params(layer)
    return {"dense": {"macs": macs, "params": params}, "moee": {"macs": round(moee_macs), "params": moee_params}}


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine similarity of the rows of two feature matrices [N, D]. With D = 1 a row's cosine is a sign alone, so that of
    the two columns is taken."""
    if a.shape[1] == 1:
        a, b = a.T, b.T
    parts = zip(a.split(ROWS), b.split(ROWS), strict=True)  # float64 takes four times what half precision does
    return float(torch.cat([nn.functional.cosine_similarity(x.double(), y.double(), dim=1) for x, y in parts]).mean())
