"""Which modules of a model are MLPs that experts can be taken from: found by what they hold, proved by running them.

`moee.mlps.structure` lists the modules that may be one, `moee.mlps.flow` those whose parts lie apart. `find_ffns` runs the model
once and holds what each of them returned against the formula down(act(up(x))). What differs stays dense, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from moee.cures import cures
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.interface.adapted import title_of_model
from moee.layers.report import FROM_THE_START, LayerReport, left_dense
from moee.mlps.flow import Flow, has_weights
from moee.mlps.gated import NO_EXPERTS
from moee.mlps.proof import ELSEWHERE, SUMMARY, Call, Run, prove, prove_alone, random_images
from moee.mlps.scales import following_scales
from moee.mlps.sites import inseparable, mlp_module
from moee.mlps.strain import strained
from moee.mlps.structure import HOOKED, SHARED, Dense, candidates, hooked
from moee.models.ffn import FFN
from moee.models.model import Shape

LISTED = 2  # names of a group in a sentence
EXCLUDED = "excluded"


@dataclass(frozen=True)
class Found:
    """The MLPs `ffns` of a model in its order, and the candidates that stay `dense`, by name. `unscaled` are MLPs with a weight
    beside them that may scale their output, which could not be proved: their `scale` is None."""

    ffns: list[FFN]
    dense: dict[str, Dense] = field(default_factory=dict)
    unscaled: list[str] = field(default_factory=list)


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
            dense[name] = Dense(EXCLUDED, found.hidden)
        elif isinstance(found, Dense):
            dense[name] = found
        else:
            plain[name] = found
    calls = _without_summaries(plain, {name: run.calls[name] for name in plain})
    plain = {name: ffn.readings()[calls[name].reading] for name, ffn in plain.items()}
    dense |= {name: Dense(call.obstacle, plain[name].hidden) for name, call in calls.items() if call.obstacle}
    parts = {name: (name, *ffn.bypassed) for name, ffn in plain.items() if name not in dense}
    seen = [name for name, paths in parts.items() if any(hooked(model.get_submodule(path)) for path in paths)]
    dense |= {name: Dense(HOOKED, plain[name].hidden) for name in seen}
    split = [ffn for name, ffn in plain.items() if ffn.bypassed and name not in dense]
    dense |= {name: Dense(why, plain[name].hidden) for name, why in inseparable(model, split, run.images, run.output).items()}
    if run.images is not None and not run.images.is_meta:
        left = {name: ffn for name, ffn in plain.items() if name not in dense}
        dense |= {name: Dense(why, plain[name].hidden) for name, why in strained(model, left, run.images).items()}
    if not gated:
        others = [ffn for name, ffn in plain.items() if ffn.gated and name not in dense]
        dense |= {ffn.name: Dense(NO_EXPERTS, ffn.hidden) for ffn in others}
    ffns, unscaled = _scaled(model, [ffn for name, ffn in plain.items() if name not in dense], shape)
    if not ffns:
        reasons = {name: part.reason for name, part in dense.items()}
        what = f"; it holds {described(reasons)}" if dense else ""
        ways: tuple[str, ...] = ("leave out --exclude",) if EXCLUDED in reasons.values() else ()
        ways += ("use --preset static", "try --methods static,corp") if NO_EXPERTS in reasons.values() else ()
        cure = cures(*ways, elsewhere="choose a model with such MLPs")
        raise UserError(f"{title_of_model(model)} has no fc1-act-fc2 MLP to take experts from{what}; {cure}")
    return Found(ffns, {name: dense[name] for name in names if name in dense}, unscaled)


def _without_summaries(ffns: dict[str, FFN], calls: dict[str, Call]) -> dict[str, Call]:
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
    scales = following_scales(model, outputs, images[:2])
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
def _run(model: nn.Module, listed: dict[str, FFN | Dense], exclude: tuple[str, ...], shape: Shape) -> Run:
    """One forward pass on a few random images that watches the MLPs among the `listed` modules, and what follows what outside of
    them; without memory a second one, on one image."""
    ffns = {name: found for name, found in listed.items() if isinstance(found, FFN)}
    whole = {name for name, found in listed.items() if isinstance(found, FFN) or found.reason == SHARED}
    like = next(model.parameters(), None)
    if like is None or not (ffns or Flow(model, whole, lambda *_: ("", 0)).maps):
        return Run()
    images = random_images(shape, like)
    watched = {name: ffn for name, ffn in ffns.items() if not _excluded(name, exclude)}
    run = prove(model, watched, whole, images)
    if not images.is_meta:
        return run
    alone = prove(model, watched, whole, torch.empty(1, *shape, device="meta"))
    for name, call in run.calls.items():
        ffn = watched.get(name) or run.sites[name].read
        if call.obstacle or not isinstance(ffn, FFN):
            continue
        if name not in alone.calls or call.tokens != alone.calls[name].tokens:
            run.calls[name] = replace(call, obstacle=ELSEWHERE)
        else:
            obstacle, reading = prove_alone(mlp_module(model, name, ffn.bypassed), ffn)
            run.calls[name] = replace(call, obstacle=obstacle, reading=reading)
    return run


def _with_sites(model: nn.Module, modules: dict[str, FFN | Dense], run: Run) -> dict[str, FFN | Dense]:
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
