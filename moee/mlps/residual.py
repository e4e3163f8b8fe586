"""What the output of an MLP or an attention is added to, whatever block it stands in.

A pre-norm block has it at hand: its norms read it. A module's input is taken for it if the block's output is that input plus
the MLP's output behind its LayerScale, on random images; and the stream before an attention, if with the attention's
output it is the stream before the MLP. It reads once, and before the output is there: behind a tiny LayerScale what comes later
looks the same. Where no module reads it (parallel blocks, norms behind the sum), the answer is that none does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moee.interface.adapted import tensor_in
from moee.mlps.scales import blocks_above, weights_of
from moee.models.ffn import FFN

CLOSE = 1e-4  # of the largest value. The nearest is taken: behind a tiny LayerScale two tensors of a block may be as alike


@dataclass(frozen=True)
class Reader:
    """The path of a module that reads [..., D], or [B, D, H, W] with `channels_first`."""

    path: str
    channels_first: bool

    def tokens(self, x: Tensor) -> Tensor:
        """What it reads as [tokens, D] in reading order."""
        return _tokens(x, self.channels_first)


@dataclass(frozen=True)
class AttentionSite:
    """An attention by its path: what reads the stream that its output is added to, and the LayerScale [D] behind it, if any."""

    name: str
    reader: Reader
    scale: Tensor | None


class _Seen(NamedTuple):
    """Inputs and outputs of modules in one forward pass, by their paths, and the turns at which they came."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    read: dict[str, list[int]]
    given: dict[str, int]


def residual_readers(model: nn.Module, ffns: Sequence[FFN], images: Tensor) -> dict[str, Reader]:
    """By the name of an MLP, a module that reads what its output is added to; those without one are left out.

    `images` [B, C, H, W]: one forward pass of the dense `model`.
    """
    seen = _watched(model, {block for ffn in ffns for block in blocks_above(ffn.name)}, images)
    found: dict[str, Reader] = {}
    for ffn in ffns:
        for block in blocks_above(ffn.name):
            whole, output = seen.outputs.get(block), seen.outputs.get(ffn.output_name)
            if whole is None or output is None or ffn.name in found:
                continue
            added = _scaled(_tokens(output, ffn.channels_first), ffn.scale)
            before = [each - added for each in _readings(whole).values() if each.shape == added.shape]
            reads = _read_in(seen, block, ffn.output_name)
            tried = [(_distance(tokens, each), reader) for reader, tokens in reads for each in before]
            distance, nearest = min(tried, key=lambda pair: pair[0], default=(CLOSE, None))
            if nearest is not None and distance < CLOSE:
                found[ffn.name] = nearest
    return found


def attention_sites(
    model: nn.Module, readers: Mapping[str, Reader], attentions: Iterable[str], images: Tensor
) -> dict[str, AttentionSite]:
    """By the name of an MLP with one of the `readers`, the attention among those named that stands before it in its block.

    `images` [B, C, H, W]: one forward pass of the dense `model`.
    """
    pairs = [(name, mlp) for name in attentions for mlp in readers if mlp.startswith(f"{_block(name)}.")]
    seen = _watched(model, {_block(name) for name, _ in pairs}, images)
    found: dict[str, AttentionSite] = {}
    for name, mlp in pairs:
        if name not in seen.outputs or readers[mlp].path not in seen.inputs:
            continue
        added, expected = _tokens(seen.outputs[name], False), readers[mlp].tokens(seen.inputs[readers[mlp].path])
        read = [(reader, tokens) for reader, tokens in _read_in(seen, _block(name), name) if tokens.shape == added.shape]
        scales: list[Tensor | None] = [None, *weights_of(model.get_submodule(_block(name)), added.shape[1])]
        tried = [
            (_distance(tokens + _scaled(added, scale), expected), AttentionSite(name, reader, scale))
            for scale in scales
            for reader, tokens in read
        ]
        distance, nearest = min(tried, key=lambda pair: pair[0], default=(CLOSE, None))
        if nearest is not None and distance < CLOSE:
            found[mlp] = nearest
    return found


@torch.no_grad()
def _watched(model: nn.Module, blocks: set[str], images: Tensor) -> _Seen:
    """What the modules of the blocks read and give, and what the blocks give."""
    seen, turns = _Seen({}, {}, {}, {}), count()

    def reads(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.inputs[path] = args[0]
            seen.read.setdefault(path, []).append(next(turns))

    def gives(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = tensor_in(output)
        if given is not None:
            seen.outputs[path], seen.given[path] = given, next(turns)

    handles = []
    for path, module in model.named_modules():
        if path in blocks or any(path.startswith(f"{block}.") for block in blocks):
            handles.append(module.register_forward_pre_hook(partial(reads, path)))
            handles.append(module.register_forward_hook(partial(gives, path)))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _read_in(seen: _Seen, block: str, before: str) -> list[tuple[Reader, Tensor]]:
    """What the modules in a block read once, before the module `before` gives, in every way in which it may be tokens."""
    known = ((path, x) for path, x in seen.inputs.items() if path.startswith(f"{block}."))
    inside = [(path, x) for path, x in known if len(seen.read[path]) == 1 and seen.read[path][0] < seen.given[before]]
    return [(Reader(path, first), tokens) for path, x in inside for first, tokens in _readings(x).items()]


def _block(name: str) -> str:
    return name.rpartition(".")[0]


def _tokens(x: Tensor, channels_first: bool) -> Tensor:
    x = x.movedim(1, -1) if channels_first else x
    return x.reshape(-1, x.shape[-1])


def _readings(x: Tensor) -> dict[bool, Tensor]:
    """A tensor as tokens, its channels last, and first where it may be a map."""
    return {first: _tokens(x, first) for first in (False, *[True] * (x.dim() == 4))} if x.dim() else {}


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, of the largest value; infinite for other shapes and what is not finite."""
    if a.shape != b.shape:
        return float("inf")
    distance = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
    return distance if distance == distance else float("inf")
