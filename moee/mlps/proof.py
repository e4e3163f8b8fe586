"""Whether a module computes what its parts say: it is run on images, and its output is held against the formula."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moee.errors import UserError
from moee.interface.adapted import BY_CONTENT, asks_for_values, title_of_model
from moee.mlps.flow import Flow, Near, Site
from moee.mlps.sites import SplitMLP
from moee.mlps.structure import read_module, read_split, runs_several_times
from moee.models.ffn import FFN
from moee.models.model import Shape
from moee.schema import reason_of

IMAGES = 3  # of the proof's batch: one image, another, and the first again
PROOF_TOKENS = 1024  # of an MLP's input, evenly spaced, that are held against the formula
ROUNDING = 2  # units in the last place of the summands' absolute sum: float32 came to 0.08 at 384 x 1,536, less beyond
STRAIN = 256.0  # times what images give: a power of two, so that scaling rounds nothing; what bends or clips beyond them shows
UNALIKE = 1e-2  # of the difference between two images' tokens: what one image's may differ by from place to place in a batch


@dataclass(frozen=True)
class Call:
    """What a candidate's run showed: how often it ran, its tokens an image, what speaks against it ("": nothing), and which of
    its readings (`FFN.readings`) it is."""

    count: int = 0
    tokens: int = 0
    obstacle: str = ""
    reading: int = 0


@dataclass(frozen=True)
class Run:
    """What one forward pass showed of the MLPs that are modules and of those whose parts lie apart; its images and its output."""

    calls: dict[str, Call] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    near: dict[str, Near] = field(default_factory=dict)
    images: Tensor | None = None
    output: Any = None


ELSEWHERE = "its input does not depend on the image"
UNORDERED = "its tokens do not lie image by image"
CHOSEN = "sees tokens that the model picks by what they hold, as the experts of a mixture do"
SUMMARY = "sees one token an image"


def random_images(shape: Shape, like: Tensor) -> Tensor:
    """Smooth noise [IMAGES, C, H, W] at the scale of normalised images; the last is the first again."""
    if like.is_meta:
        return torch.empty(IMAGES, *shape, device="meta")
    generator = torch.Generator().manual_seed(0)
    channels, height, width = shape
    coarse = torch.randn(2, channels, -(-height // 16), -(-width // 16), generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images = smooth + 0.3 * torch.randn(2, *shape, generator=generator)
    return images[[0, 1, 0]].to(like.device, like.dtype)


def prove(model: nn.Module, ffns: dict[str, FFN], whole: set[str], images: Tensor) -> Run:
    """Run the model on `images` and hold what the MLPs `ffns` give against their formulas. `whole`: modules that are MLPs or
    share weights, in which no split MLP is looked for."""
    calls = {name: Call() for name in ffns}
    shapes = {name: list[torch.Size]() for name in ffns}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            call = calls[name]
            shapes[name] += [given.shape for given in args[:1] if isinstance(given, Tensor)]
            if not call.count:
                call = judge(ffns[name], args, kwargs, output, len(images))
            calls[name] = replace(call, count=call.count + 1)

        return see

    def of_split(ffn: FFN, args: tuple, kwargs: dict, output: Any) -> tuple[str, int]:
        call = judge(ffn, args, kwargs, output, len(images))
        return call.obstacle, call.tokens

    flow = Flow(model, whole, of_split)
    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in ffns]
    handles += flow.watch()
    try:
        output = model(images)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # any code may stand behind a model
        if images.is_meta and asks_for_values(error):
            raise UserError(f"{title_of_model(model)} cannot be read by its shapes: {BY_CONTENT}") from error
        reason = reason_of(error)
        size = " x ".join(map(str, images.shape[1:]))
        raise UserError(f"{title_of_model(model)} does not run on images of {size}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    for name, call in calls.items():
        if not call.count:
            calls[name] = replace(call, obstacle="takes no part in a forward pass")
        elif call.count > 1:
            calls[name] = replace(call, obstacle=runs_several_times(call.count))
    odd = {name: shapes[name] for name, call in calls.items() if call.count != 1 or call.obstacle in (ELSEWHERE, UNORDERED)}
    calls |= {name: replace(calls[name], obstacle=CHOSEN) for name in _picked(model, odd, images)}
    sites = flow.sites()
    calls |= {name: Call(1, site.tokens) for name, site in sites.items() if isinstance(site.read, FFN)}
    return Run(calls, sites, flow.near, images, output)


def _picked(model: nn.Module, shapes: dict[str, list[torch.Size]], images: Tensor) -> list[str]:
    """Of modules that were called with tensors of these `shapes`, those that get others from other images than `images`."""
    if not shapes or images.is_meta:
        return []
    found = {name: list[torch.Size]() for name in shapes}

    def hook(name: str) -> Any:
        return lambda module, args: found[name].extend(given.shape for given in args[:1] if isinstance(given, Tensor))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in shapes]
    try:
        model(images[[1, 0, 1]].roll(images.shape[-1] // 2, -1))
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in shapes if found[name] != shapes[name]]


def judge(ffn: FFN, args: tuple, kwargs: dict, output: Any, images: int) -> Call:
    """What a call shows of an MLP; it counts for none yet."""
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    if len(given) == 1 and kwargs:
        return Call(obstacle=f"is called by keyword ({next(iter(kwargs))}=), expected one tensor without")
    if len(given) != 1 or not isinstance(given[0], Tensor):
        return Call(obstacle=f"is called with {len(given)} arguments, expected one tensor")
    x = given[0]
    axis = 1 if ffn.channels_first else -1
    if x.ndim < 2 or x.shape[axis] != ffn.dim or (ffn.channels_first and x.ndim != 4):
        return Call(obstacle=f"reads a tensor of the shape {list(x.shape[1:])} an image, expected tokens of width {ffn.dim}")
    if not isinstance(output, Tensor) or output.shape != x.shape:
        came = list(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__
        return Call(obstacle=f"turns {list(x.shape[1:])} an image into {came}")
    if not x.numel():
        return Call(obstacle=CHOSEN)
    tokens, rest = divmod(x.numel() // ffn.dim, images)
    if rest:
        return Call(obstacle=ELSEWHERE)
    if x.is_meta:
        return Call(tokens=tokens)
    for what, tensor in (("receives", x), ("gives", output)):
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"`{ffn.name}` {what} NaN or infinite activations on random images; check the weights and the input normalisation"
            )
    if images == IMAGES:
        first, other, again = x.reshape(IMAGES, -1).float()
        apart = float((first - other).norm())
        if not float((first - again).norm()) <= UNALIKE * apart:
            return Call(tokens=tokens, obstacle=ELSEWHERE if apart == 0 else UNORDERED)
        if apart == 0:
            return Call(tokens=tokens, obstacle=ELSEWHERE)
    distances = [disagreement(reading, x, output) for reading in ffn.readings()]
    best = min(range(len(distances)), key=distances.__getitem__)
    obstacle = "" if distances[best] <= 1 else f"computes something else than {ffn.formula}"
    return Call(tokens=tokens, obstacle=obstacle, reading=best)


def disagreement(ffn: FFN, x: Tensor, output: Tensor, other: Tensor | None = None) -> float:
    """Largest difference between `output` and the formula of `ffn` in float32, or `other`, in units of what rounding may make of
    it: up to 1 it is the same function. `x` and `output` are what a module read and gave; evenly spaced tokens of them are
    judged. NaN counts as infinitely far.
    """
    count = x.numel() // ffn.dim
    rows = torch.arange(0, count, max(1, count // PROOF_TOKENS), device=x.device)

    def some(values: Tensor) -> Tensor:
        values = values.movedim(1, -1) if ffn.channels_first else values
        return values.reshape(-1, ffn.dim)[rows].float()

    tokens, given = some(x), some(output)
    expected, summands = ffn.proof(tokens)
    expected = expected if other is None else some(other)
    bound = ROUNDING * torch.finfo(output.dtype).eps * summands + torch.finfo(torch.float32).tiny
    worst = float(((given - expected).abs() / bound).max())
    return worst if worst == worst else float("inf")


def strained_obstacle(ffn: FFN) -> str:
    """What speaks against an MLP that is another function on inputs `STRAIN` times as large."""
    return f"computes something else than {ffn.formula} on inputs {STRAIN:g} times as large, such as a clamp makes of it"


def prove_alone(module: nn.Module, ffn: FFN) -> tuple[str, int]:
    """The proof for a module without memory, on random weights and tokens: what speaks against it, and which reading it is."""
    own = copy.deepcopy(module).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in own.parameters():
        parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    read = read_split(("", *ffn.bypassed), own.up, own.act, own.down) if isinstance(own, SplitMLP) else read_module(ffn.name, own)
    assert isinstance(read, FFN), "its structure is that of `ffn`"
    shape = (2, ffn.dim, 2, 2) if ffn.channels_first else (2, 5, ffn.dim)
    x = torch.randn(shape, generator=generator)
    try:
        output, strained = own(x), own(x * STRAIN)
    except MemoryError:
        raise
    except Exception as error:  # any code may stand behind a module
        return f"does not run on tokens: {reason_of(error)}", 0
    call = judge(read, (x,), {}, output, len(x))
    if not call.obstacle and not disagreement(read.readings()[call.reading], x * STRAIN, strained) <= 1:
        return strained_obstacle(read), call.reading
    return call.obstacle, call.reading
