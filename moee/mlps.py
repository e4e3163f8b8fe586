"""Which modules of a model are MLPs that experts can be taken from: found by what they hold, proved by running them.

`moee.mlp_structure` lists the modules that may be one, `moee.mlp_flow` those whose parts lie apart. `find_ffns` runs the model
once and holds what each of them returned against the formula down(act(up(x))). What differs stays dense, with the reason.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moee.data import model_transform
from moee.errors import UserError
from moee.gated import ONLY_STATIC
from moee.interface import title_of_model
from moee.layer_report import FROM_THE_START, LayerReport, left_dense
from moee.mlp_flow import Flow, Near, Site, has_weights
from moee.mlp_sites import SplitMLP, inseparable, mlp_module
from moee.mlp_structure import SHARED, Dense, candidates, read_module, read_split
from moee.models import FFN, Shape
from moee.scales import following_scales
from moee.schema import reason_of

IMAGES = 3  # of the proof's batch: one image, another, and the first again
PROOF_TOKENS = 1024  # of an MLP's input, evenly spaced, that are held against the formula
ROUNDING = 2  # units in the last place of the summands' absolute sum: float32 came to 0.08 at 384 x 1,536, less beyond
UNALIKE = 1e-2  # of the difference between two images' tokens: what one image's may differ by from place to place in a batch
LISTED = 2  # names of a group in a sentence


@dataclass(frozen=True)
class Found:
    """The MLPs `ffns` of a model in its order, and the candidates that stay `dense`, by name. `unscaled` are MLPs with a weight
    beside them that may scale their output, which could not be proved: their `scale` is None."""

    ffns: list[FFN]
    dense: dict[str, Dense] = field(default_factory=dict)
    unscaled: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    """What a candidate's run showed: how often it ran, its tokens an image, what speaks against it ("": nothing), and which of
    its readings (`FFN.readings`) it is."""

    count: int = 0
    tokens: int = 0
    obstacle: str = ""
    reading: int = 0


@dataclass(frozen=True)
class _Run:
    """What one forward pass showed of the MLPs that are modules and of those whose parts lie apart; its images and its output."""

    calls: dict[str, _Call] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    near: dict[str, Near] = field(default_factory=dict)
    images: Tensor | None = None
    output: Any = None


def find_ffns(model: nn.Module, exclude: tuple[str, ...] = (), shape: Shape | None = None, gated: bool = False) -> Found:
    """Every MLP of the model in execution order of its definition, proved on a batch of random images of `shape` (default: what
    the model was built for). A model without memory (on the meta device) is judged by its shapes and its MLPs on random weights.

    `gated`: gated MLPs are among them (`GatedMLP`); without, they stay dense, since only static pruning cuts them.
    `exclude` names modules, or prefixes of them (`blocks.3`), that stay dense. Raises `UserError` for an exclusion that matches
    nothing, for a model that cannot run, and for one with nothing to cut: the sentence lists what stays dense and why.
    """
    shape = shape or model_transform(model).shape
    modules = candidates(model)
    run = _run(model, modules, exclude, shape)
    listed = _in_order(model, _with_sites(model, modules, run))
    names = list(listed)
    for pattern in exclude:
        if not any(_matches(name, pattern) for name in names):
            mlps = [name for name, found in listed.items() if isinstance(found, FFN)]
            raise UserError(f"--exclude {pattern} matches no MLP; this model's MLPs are {', '.join(mlps) or 'none'}")
    dense: dict[str, Dense] = {}
    plain: dict[str, FFN] = {}
    for name, found in listed.items():
        if _excluded(name, exclude):
            dense[name] = Dense("excluded", found.hidden)
        elif isinstance(found, Dense):
            dense[name] = found
        else:
            plain[name] = found
    calls = _without_summaries(plain, {name: run.calls[name] for name in plain})
    plain = {name: ffn.readings()[calls[name].reading] for name, ffn in plain.items()}
    dense |= {name: Dense(call.obstacle, plain[name].hidden) for name, call in calls.items() if call.obstacle}
    split = [ffn for name, ffn in plain.items() if ffn.bypassed and name not in dense]
    dense |= {name: Dense(why, plain[name].hidden) for name, why in inseparable(model, split, run.images, run.output).items()}
    if not gated:
        left = [ffn for name, ffn in plain.items() if ffn.only_static and name not in dense]
        dense |= {ffn.name: Dense(ONLY_STATIC, ffn.hidden) for ffn in left}
    ffns, unscaled = _scaled(model, [ffn for name, ffn in plain.items() if name not in dense], shape)
    if not ffns:
        reasons = {name: part.reason for name, part in dense.items()}
        what = f"; it holds {described(reasons)}" if dense else ""
        other = ONLY_STATIC in reasons.values()
        cure = "use --preset static" if other else "choose a Vision Transformer"
        raise UserError(f"{title_of_model(model)} has no fc1-act-fc2 MLP to take experts from{what}; {cure}")
    return Found(ffns, {name: dense[name] for name in names if name in dense}, unscaled)


def _without_summaries(ffns: dict[str, FFN], calls: dict[str, _Call]) -> dict[str, _Call]:
    """Speak against MLPs that read one token an image, a pooled or class token, where others of their width read many: there is
    next to nothing to save, and an image gives one token to learn from. The last stage of a hierarchical model on small images is
    none of these. Split MLPs always: squeeze-and-excitation gates look like them."""
    most: dict[int, int] = {}
    for name, call in calls.items():
        most[ffns[name].dim] = max(most.get(ffns[name].dim, 0), call.tokens)
    summaries = {
        name for name, call in calls.items()
        if call.tokens == 1 and (most[ffns[name].dim] > 1 or ffns[name].bypassed) and not call.obstacle
    }  # fmt: skip
    return {n: replace(call, obstacle=SUMMARY) if n in summaries else call for n, call in calls.items()}


def _scaled(model: nn.Module, ffns: list[FFN], shape: Shape) -> tuple[list[FFN], list[str]]:
    """The MLPs with the LayerScale behind each, and the names of those where there may be one that could not be proved."""
    images = random_images(shape, next(model.parameters()))
    if images.is_meta or not ffns:
        return ffns, []
    outputs = {ffn.output_name: (ffn.dim, 1 if ffn.channels_first else -1) for ffn in ffns}
    scales = following_scales(model, outputs, images[:1])
    unscaled = [ffn.name for ffn in ffns if not scales[ffn.output_name].verified]
    return [replace(ffn, scale=scales[ffn.output_name].weight) for ffn in ffns], unscaled


def reports_of(found: Found) -> list[LayerReport]:
    """What the artifact records of the candidates that stay dense."""
    return [left_dense(name, FROM_THE_START + part.reason, part.hidden) for name, part in found.dense.items()]


def described(reasons: dict[str, str]) -> str:
    """A clause about what stays dense: names with the reason, alike ones together."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return ", ".join(f"{grouped(names)} ({reason})" for reason, names in groups.items())


def grouped(names: list[str]) -> str:
    """The first names of a list and the number of the others."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:LISTED]) + more


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.")


def _excluded(name: str, exclude: tuple[str, ...]) -> bool:
    return any(_matches(name, pattern) for pattern in exclude)


@torch.no_grad()
def _run(model: nn.Module, listed: dict[str, FFN | Dense], exclude: tuple[str, ...], shape: Shape) -> _Run:
    """One forward pass on a few random images that watches the MLPs among the `listed` modules, and what follows what outside of
    them; without memory a second one, on one image."""
    ffns = {name: found for name, found in listed.items() if isinstance(found, FFN)}
    whole = {name for name, found in listed.items() if isinstance(found, FFN) or found.reason == SHARED}
    like = next(model.parameters(), None)
    if like is None or not (ffns or Flow(model, whole, lambda *_: ("", 0)).maps):
        return _Run()
    images = random_images(shape, like)
    watched = {name: ffn for name, ffn in ffns.items() if not _excluded(name, exclude)}
    run = _watched(model, watched, whole, images)
    if not images.is_meta:
        return run
    alone = _watched(model, watched, whole, torch.empty(1, *shape, device="meta"))
    for name, call in run.calls.items():
        ffn = watched.get(name) or run.sites[name].read
        if call.obstacle or not isinstance(ffn, FFN):
            continue
        if name not in alone.calls or call.tokens != alone.calls[name].tokens:
            run.calls[name] = replace(call, obstacle=ELSEWHERE)
        else:
            obstacle, reading = _prove_alone(mlp_module(model, name, ffn.bypassed), ffn)
            run.calls[name] = replace(call, obstacle=obstacle, reading=reading)
    return run


def _with_sites(model: nn.Module, modules: dict[str, FFN | Dense], run: _Run) -> dict[str, FFN | Dense]:
    """The candidates that are modules, and those whose parts lie apart. A module that is no MLP gives way to what is known of the
    parts inside it, unless it holds nothing else and its own reason says as much."""
    found: dict[str, FFN | Dense] = dict(modules)
    for name, site in run.sites.items():
        around = [module for module in modules if name.startswith(f"{module}.")]
        own = {id(p) for path in site.parts for p in model.get_submodule(path).parameters()}
        exact = any(all(id(p) in own for p in model.get_submodule(module).parameters()) for module in around)
        if not exact or (site.proved and site.tokens > 1):
            found = {n: read for n, read in found.items() if n not in around} | {name: site.read}
    for name, near in run.near.items():
        around = [module for module in modules if name.startswith(f"{module}.")]
        others = [part for module in around for path, part in model.get_submodule(module).named_modules(prefix=module)
                  if path not in near.parts and has_weights(part)]  # fmt: skip
        if name not in found and (not around or near.kind == "function" or (near.kind == "more" and others)):
            found = {n: read for n, read in found.items() if n not in around} | {name: near.read}
    return found


def _in_order(model: nn.Module, listed: dict[str, FFN | Dense]) -> dict[str, FFN | Dense]:
    return {name: listed[name] for name, _ in model.named_modules() if name in listed}


ELSEWHERE = "its input does not depend on the image"
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


def _watched(model: nn.Module, ffns: dict[str, FFN], whole: set[str], images: Tensor) -> _Run:
    calls = {name: _Call() for name in ffns}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            call = calls[name]
            if not call.count:
                call = _judge(ffns[name], args, kwargs, output, len(images))
            calls[name] = replace(call, count=call.count + 1)

        return see

    def judge(ffn: FFN, args: tuple, kwargs: dict, output: Any) -> tuple[str, int]:
        call = _judge(ffn, args, kwargs, output, len(images))
        return call.obstacle, call.tokens

    flow = Flow(model, whole, judge)
    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in ffns]
    handles += flow.watch()
    try:
        output = model(images)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # any code may stand behind a model
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
            calls[name] = replace(call, obstacle=f"runs {call.count} times an image")
    sites = flow.sites()
    calls |= {name: _Call(1, site.tokens) for name, site in sites.items() if isinstance(site.read, FFN)}
    return _Run(calls, sites, flow.near, images, output)


def _judge(ffn: FFN, args: tuple, kwargs: dict, output: Any, images: int) -> _Call:
    """What a call shows of an MLP; it counts for none yet."""
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    if len(given) != 1 or kwargs or not isinstance(given[0], Tensor):
        return _Call(obstacle=f"is called with {len(given)} arguments, expected one tensor")
    x = given[0]
    axis = 1 if ffn.channels_first else -1
    if x.ndim < 2 or x.shape[axis] != ffn.dim or (ffn.channels_first and x.ndim != 4):
        return _Call(obstacle=f"reads a tensor of the shape {list(x.shape[1:])} an image, expected tokens of width {ffn.dim}")
    if not isinstance(output, Tensor) or output.shape != x.shape:
        came = list(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__
        return _Call(obstacle=f"turns {list(x.shape[1:])} an image into {came}")
    tokens, rest = divmod(x.numel() // ffn.dim, images)
    if rest:
        return _Call(obstacle=ELSEWHERE)
    if x.is_meta:
        return _Call(tokens=tokens)
    for what, tensor in (("receives", x), ("gives", output)):
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"`{ffn.name}` {what} NaN or infinite activations on random images; check the weights and the input normalisation"
            )
    if images == IMAGES:
        first, other, again = x.reshape(IMAGES, -1).float()
        apart = float((first - other).norm())
        if not float((first - again).norm()) <= UNALIKE * apart:
            return _Call(tokens=tokens, obstacle=ELSEWHERE if apart == 0 else "its tokens do not lie image by image")
        if apart == 0:
            return _Call(tokens=tokens, obstacle=ELSEWHERE)
    distances = [disagreement(reading, x, output) for reading in ffn.readings()]
    best = min(range(len(distances)), key=distances.__getitem__)
    obstacle = "" if distances[best] <= 1 else f"computes something else than {ffn.formula}"
    return _Call(tokens=tokens, obstacle=obstacle, reading=best)


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


def _prove_alone(module: nn.Module, ffn: FFN) -> tuple[str, int]:
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
        output = own(x)
    except MemoryError:
        raise
    except Exception as error:  # any code may stand behind a module
        return f"does not run on tokens: {reason_of(error)}", 0
    call = _judge(read, (x,), {}, output, len(x))
    return call.obstacle, call.reading
