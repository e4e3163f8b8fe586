"""What an MLP's output is added to, whatever block it stands in.

A pre-norm block has it at hand: its second norm reads it. A module's input is taken for it if the block's output is that input
plus the MLP's output behind its LayerScale, on random images. Where no module reads it (parallel blocks, norms behind the sum),
the answer is that none does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moee.interface.adapted import tensor_in
from moee.mlps.scales import blocks_above
from moee.models.ffn import FFN

CLOSE = 1e-4  # of the largest value; another tensor of the block differs by as much as the values themselves


@dataclass(frozen=True)
class Reader:
    """The path of a module that reads [..., D], or [B, D, H, W] with `channels_first`."""

    path: str
    channels_first: bool

    def tokens(self, x: Tensor) -> Tensor:
        """What it reads as [tokens, D] in reading order."""
        return _tokens(x, self.channels_first)


def _tokens(x: Tensor, channels_first: bool) -> Tensor:
    x = x.movedim(1, -1) if channels_first else x
    return x.reshape(-1, x.shape[-1])


@torch.no_grad()
def residual_readers(model: nn.Module, ffns: Sequence[FFN], images: Tensor) -> dict[str, Reader]:
    """By the name of an MLP, a module that reads what its output is added to; those without one are left out.

    `images` [B, C, H, W]: one forward pass of the dense `model`.
    """
    inside: dict[str, list[FFN]] = {}
    for ffn in ffns:
        for block in blocks_above(ffn.name):
            inside.setdefault(block, []).append(ffn)
    found: dict[str, Reader] = {}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def reads(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            inputs[path] = args[0]

    def gives(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[path] = output

    def judges(block: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        whole = tensor_in(output)
        for ffn in inside[block]:
            if whole is None or ffn.output_name not in outputs or ffn.name in found:
                continue
            added = _tokens(outputs[ffn.output_name], ffn.channels_first)
            added = added if ffn.scale is None else added * ffn.scale
            before = [sum_ - added for sum_ in _readings(whole).values() if sum_.shape == added.shape]
            for path in (path for path in inputs if path.startswith(f"{block}.")):
                for first, tokens in _readings(inputs[path]).items():
                    if ffn.name not in found and any(_alike(tokens, expected) for expected in before):
                        found[ffn.name] = Reader(path, first)

    handles = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{block}.") for block in inside):
            handles.append(module.register_forward_pre_hook(partial(reads, path)))
            handles.append(module.register_forward_hook(partial(gives, path)))
        if path in inside:
            handles.append(module.register_forward_hook(partial(judges, path)))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _readings(x: Tensor) -> dict[bool, Tensor]:
    """A tensor as tokens, its channels last, and first where it may be a map."""
    return {first: _tokens(x, first) for first in (False, *[True] * (x.dim() == 4))}


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= CLOSE * float(b.abs().max())
