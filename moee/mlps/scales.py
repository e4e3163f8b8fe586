"""The LayerScale behind a module, whatever it is called: a weight [D] of the block is taken for one if the block's output
answers to the module's output by exactly that factor, and where none does, the factor by which it answers.

The block is run again on its own input with the module's output moved by r / weight for random r; behind that weight, and
nothing else, its output moves by r. A factor that is no weight by itself, such as one of a buffer, of a list, or tanh of a
parameter, is measured: moved by r, the output moves by the factor times r, the same for every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moee.interface.adapted import tensor_in

CLOSE = 1e-3  # of r; what rounding leaves of it is 1e-6, another weight's answer is of the order of 1
ALIKE = 0.2  # of a factor that is measured by a small and by a large step: what is no factor bends
LEVELS = 2  # modules above that may hold the weight: the block, or the block around a sequence


@dataclass(frozen=True)
class Scale:
    """`weight` [D] behind a module, None where there is none. `verified`: the block's output showed it. Where the block holds no
    weight of that size, an output that answers otherwise counts as none: a norm behind the module, or another map."""

    weight: Tensor | None = None
    verified: bool = True


@torch.no_grad()
def following_scales(model: nn.Module, outputs: Mapping[str, tuple[int, int]], images: Tensor) -> dict[str, Scale]:
    """The scale behind each named module; `outputs` says how wide its output is, and along which axis (-1, or 1 of a map).

    `images` [B, C, H, W]: one forward pass, and per module one run of a block around it for each weight that could be the one,
    and two to measure, from the inside out. Where nothing fits in the innermost block with such weights, the result is not
    verified.
    """
    blocks: dict[str, list[str]] = {}
    found = {name: Scale() for name in outputs}
    for name, (width, _) in outputs.items():
        for block in blocks_above(name):
            blocks.setdefault(block, []).append(name)
            if weights_of(model.get_submodule(block), width):
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
                    choices = weights_of(block, width)
                    scale = _proved(_Run(model.get_submodule(name), axis, block, args, kwargs, given), width, choices)
                    if scale.weight is not None or (choices and name not in judged):  # the innermost says that there is none
                        found[name] = scale
                    if choices:
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


def _proved(run: _Run, width: int, choices: list[Tensor]) -> Scale:
    for weight in choices:
        if _answers(run, weight):
            return Scale(weight)
    factor = _factor(run, torch.ones(width, dtype=run.output.dtype, device=run.output.device))
    if factor is None:
        return Scale(verified=False)
    return Scale(None if float((factor - 1).abs().max()) <= CLOSE else factor)


class _Moved(NamedTuple):
    """What the module's output was moved by, in units of its weight, and by what its block's output moved; `size` of that."""

    step: Tensor
    answer: Tensor
    size: float


def _move(run: _Run, weight: Tensor) -> _Moved | None:
    """Run the block with the module's output moved by r / weight; None where that shows nothing."""
    steps: list[Tensor] = []
    size = float(run.output.float().square().mean().sqrt()) or 1.0
    generator = torch.Generator().manual_seed(0)
    along = weight if run.axis == -1 else weight.view(-1, 1, 1)

    def move(part: nn.Module, inputs: tuple, result: Tensor) -> Tensor:
        step = size * torch.randn(result.shape, generator=generator).to(result)
        steps.append(torch.where(along == 0, 0, step))  # nothing comes through where the weight is 0
        return result + step / torch.where(along == 0, 1, along)

    handle = run.module.register_forward_hook(move)
    try:
        answer = tensor_in(run.block.forward(*run.args, **run.kwargs))
    except Exception:  # a block that cannot be run a second time shows nothing
        return None
    finally:
        handle.remove()
    if len(steps) != 1 or answer is None or answer.shape != run.output.shape or answer.numel() != steps[0].numel():
        return None
    return _Moved(steps[0].float(), (answer - run.output).float(), size)


def _answers(run: _Run, weight: Tensor) -> bool:
    """Whether the block's output moves by r when the module's moves by r / weight."""
    moved = _move(run, weight)
    return moved is not None and any(
        float((answer - moved.step).abs().max()) <= CLOSE * moved.size for answer in _forms(moved.answer, moved.step.shape)
    )


def _factor(run: _Run, ones: Tensor) -> Tensor | None:
    """The factor [D], the same for every token, by which the block's output answers to the module's, if there is one. Measured
    twice: what is moved by a tiny factor drowns in rounding, so the second step is as much larger."""
    rough, _ = _fitted(run, ones)
    most = float(rough.abs().max()) if rough is not None else 0.0
    if not 0 < most < float("inf"):
        return None
    factor, misfit = _fitted(run, ones * most)
    if factor is None or not misfit <= CLOSE or not abs(float(factor.abs().max()) - 1) <= ALIKE:
        return None
    return factor * most


def _fitted(run: _Run, weight: Tensor) -> tuple[Tensor | None, float]:
    """The factor [D] beside `weight` that fits the block's answer best, and how far it is off, of the step's size."""
    moved = _move(run, weight)
    best: tuple[Tensor | None, float] = None, float("inf")
    if moved is None or moved.step.numel() <= len(weight):  # of one token anything is a factor
        return best
    step = moved.step.movedim(run.axis, -1).flatten(0, -2)
    for form in _forms(moved.answer, moved.step.shape):
        answer = form.movedim(run.axis, -1).flatten(0, -2)
        factor = (answer * step).sum(0) / step.square().sum(0)
        misfit = float((answer - factor * step).abs().max()) / moved.size
        if misfit < best[1]:
            best = factor, misfit
    return best


def _forms(answer: Tensor, shape: torch.Size) -> list[Tensor]:
    """A block's answer as the module gave it, of `shape`: as it is, with channels first or last, a map's places as tokens."""
    orders = [answer, answer.movedim(1, -1), answer.movedim(-1, 1)]
    return [order.reshape(shape) for order in orders]
