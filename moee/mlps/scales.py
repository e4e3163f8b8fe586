"""The LayerScale behind a module, whatever it is called: a weight [D] of the block is taken for one if the block's output
answers to the module's output by exactly that factor.

The block is run again on its own input with the module's output moved by r / weight for random r; behind that weight, and
nothing else, its output moves by r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moee.interface.adapted import tensor_in

CLOSE = 1e-3  # of r; what rounding leaves of it is 1e-6, another weight's answer is of the order of 1
LEVELS = 2  # modules above that may hold the weight: the block, or the block around a sequence


@dataclass(frozen=True)
class Scale:
    """`weight` [D] behind a module, None where there is none. `verified`: the block's output showed it."""

    weight: Tensor | None = None
    verified: bool = True


@torch.no_grad()
def following_scales(model: nn.Module, outputs: Mapping[str, tuple[int, int]], images: Tensor) -> dict[str, Scale]:
    """The scale behind each named module; `outputs` says how wide its output is, and along which axis (-1, or 1 of a map).

    `images` [B, C, H, W]: one forward pass, and per module one run of a block around it for each weight that could be the one,
    from the inside out. Where none of them fits, and the innermost block with such weights does not pass the module's output on
    as it is either, the result is not verified.
    """
    blocks: dict[str, list[str]] = {}
    found = {name: Scale() for name in outputs}
    for name, (width, _) in outputs.items():
        for block in blocks_above(name):
            if weights_of(model.get_submodule(block), width):
                blocks.setdefault(block, []).append(name)
                found[name] = Scale(verified=False)
    judged: set[str] = set()
    running = False  # a block again, for an answer: the blocks in it are not judged then

    def hook(names: list[str]) -> Any:
        def see(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            nonlocal running
            given = tensor_in(output)
            if given is None or running:
                return
            running = True
            for name in names:
                if found[name].weight is None:
                    width, axis = outputs[name]
                    scale = _proved(_Run(model.get_submodule(name), axis, block, args, kwargs, given), weights_of(block, width))
                    if scale.weight is not None or name not in judged:  # the innermost says whether there is none
                        found[name] = scale
                    judged.add(name)
            running = False

        return see

    handles = [
        model.get_submodule(block).register_forward_hook(hook(names), with_kwargs=True) for block, names in blocks.items()
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def blocks_above(name: str) -> Iterator[str]:
    """The modules around `name`, nearest first, without the model itself."""
    for _ in range(LEVELS):
        name = name.rpartition(".")[0]
        if name:
            yield name


def weights_of(block: nn.Module, width: int) -> list[Tensor]:
    """What could scale an output of `width`: the block's own parameters of that size, and those of parts that hold nothing else.
    The last first: an MLP is the end of its block."""
    found: list[Tensor] = [p for p in block.parameters(recurse=False) if p.numel() == width]
    for part in block.children():
        state = [*part.parameters(), *part.buffers()]
        if len(state) == 1 and state[0].numel() == width and next(part.children(), None) is None:
            found.append(state[0])
    return [t.detach().flatten() for t in reversed(found)]


@dataclass(frozen=True)
class _Run:
    """A block's run on images, with the module inside it whose output, channels along `axis`, is to be moved."""

    module: nn.Module
    axis: int
    block: nn.Module
    args: tuple
    kwargs: dict
    output: Tensor


def _proved(run: _Run, choices: list[Tensor]) -> Scale:
    for weight in choices:
        if _answers(run, weight):
            return Scale(weight)
    return Scale(verified=_answers(run, torch.ones_like(choices[0])))


def _answers(run: _Run, weight: Tensor) -> bool:
    """Whether the block's output moves by r when the module's moves by r / weight."""
    moved: list[Tensor] = []
    size = float(run.output.float().square().mean().sqrt()) or 1.0
    generator = torch.Generator().manual_seed(0)
    along = weight if run.axis == -1 else weight.view(-1, 1, 1)

    def move(part: nn.Module, inputs: tuple, result: Tensor) -> Tensor:
        step = size * torch.randn(result.shape, generator=generator).to(result)
        moved.append(torch.where(along == 0, 0, step))  # nothing comes through where the weight is 0
        return result + step / torch.where(along == 0, 1, along)

    handle = run.module.register_forward_hook(move)
    try:
        answer = tensor_in(run.block.forward(*run.args, **run.kwargs))
    except Exception:  # a block that cannot be run a second time shows nothing
        return False
    finally:
        handle.remove()
    if len(moved) != 1 or answer is None or answer.shape != run.output.shape:
        return False
    difference = (answer - run.output).float()
    return any(float((difference - form).abs().max()) <= CLOSE * size for form in _forms(moved[0], answer.shape))


def _forms(moved: Tensor, shape: torch.Size) -> list[Tensor]:
    """`moved` as blocks hand it on: as it is, with channels first or last, tokens laid out as a map."""
    orders = (moved, moved.movedim(-1, 1), moved.movedim(1, -1))
    return [order.reshape(shape) for order in orders if order.numel() == shape.numel()]
