"""The experts of a model made fewer, layer by layer: what is dropped and merged, and the refit that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import LayerTokens, collect_tokens
from moee.calibrate.refit import refit
from moee.data.image_set import ImageSet
from moee.data.validation import fitted_part
from moee.errors import UserError
from moee.layers.report import RefitReport
from moee.layers.routed import NeuronLayer, RoutedFFN, routed_layers
from moee.models.model import replace_module
from moee.parallel.group import SOLO, Group
from moee.progress import Reporter, silent
from moee.shrinking.merge import Merges, alike, merged_groups, merged_layer
from moee.shrinking.mixture import Mixture, extremes, super_experts
from moee.shrinking.options import ShrinkConfig
from moee.shrinking.specialise import dropped_experts, needs, without
from moee.space.limits import USUAL, Limits
from moee.store.scratch import temporary_folder


@dataclass
class ShrunkLayer:
    """What was done to a layer. `dropped` and `protected` count the experts as they were, `groups` those that were left.
    `losses`: as of `moee.shrinking.merge.Merges`."""

    name: str
    experts: tuple[int, int]
    stored: tuple[int, int]
    tokens: int
    dropped: list[int] = field(default_factory=list)
    given_up: float = 0.0
    groups: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    protected: list[int] = field(default_factory=list)
    refit: RefitReport | None = None


def mixtures_of(model: nn.Module, config: ShrinkConfig) -> list[Mixture]:
    """The layers of more than one expert. Raises `UserError` where there is none, where experts are not of neurons, and for more
    experts than there are."""
    every = routed_layers(model)
    neurons = {name: layer for name, layer in every.items() if isinstance(layer, NeuronLayer)}
    found = [Mixture(name, cast(RoutedFFN, layer)) for name, layer in neurons.items() if layer.num_experts > 1]
    if not found:
        other = sorted({type(layer).__name__ for name, layer in every.items() if name not in neurons})
        why = f"its layers are {', '.join(other)}, whose experts are no neurons" if other else "every layer has one expert"
        raise UserError(f"there are no experts to make fewer: {why}; extract with --clusters 8 first")
    most = max(mixture.layer.num_experts for mixture in found)
    if config.experts is not None and config.experts >= most:
        raise UserError(f"--experts {config.experts} merges nothing: a layer has {most} experts at most; give a lower number")
    several = max(mixture.layer.top_k for mixture in found)
    if config.experts is not None and several > 1:
        raise UserError(f"each token has {several} experts, and only layers of one expert a token are merged; use --specialise")
    return found


@torch.no_grad()
def shrink(
    model: nn.Module, config: ShrinkConfig, images: ImageSet, *, report: Reporter = silent, group: Group = SOLO,
    limits: Limits = USUAL,
) -> list[ShrunkLayer]:  # fmt: skip
    """Make the experts of `model` fewer, in place; returns what was done to each layer of several experts.

    Its own outputs on `images` are the measure and what the refit aims at: neither the dense model nor labels are needed. Raises
    `UserError` as `mixtures_of`.
    """
    mixtures = mixtures_of(model, config)
    with temporary_folder() as folder:
        sampled = collect_tokens(
            model, mixtures, images, Path(folder), config.tokens, seed=config.seed, report=report, group=group,
            limits=limits,
        )  # fmt: skip
        seen = {tokens.name: tokens for tokens in sampled}
        protected = {} if config.unprotected else _protected(mixtures, seen)
        done, merged = list[ShrunkLayer](), dict[str, Mixture]()
        report("experts compared", 0, len(mixtures))
        for mixture in mixtures:
            made = _shrunk(mixture, seen[mixture.name].load(), config, protected.get(mixture.name, []))
            replace_module(model, mixture.name, made.layer)
            if made.teacher is not None:
                merged[mixture.name] = made.teacher
            done.append(made.facts)
            report("experts compared", len(done), len(mixtures))
    if merged:
        found = {name: model.get_submodule(name) for name in merged}
        layers = {name: layer for name, layer in found.items() if isinstance(layer, NeuronLayer)}
        reports = refit(
            model, layers, merged, fitted_part(images), config.refit_tokens, ridge=config.refit_lambda, report=report,
            group=group, limits=limits,
        )  # fmt: skip
        for facts in done:
            facts.refit = reports.get(facts.name)
    return done


@dataclass(frozen=True)
class _Made:
    """A smaller layer; `teacher`: what its refit aims at, where experts were merged."""

    layer: RoutedFFN
    facts: ShrunkLayer
    teacher: Mixture | None


def _protected(mixtures: list[Mixture], seen: Mapping[str, LayerTokens]) -> dict[str, list[int]]:
    return super_experts({mixture.name: extremes(mixture, seen[mixture.name].load()) for mixture in mixtures})


def _shrunk(mixture: Mixture, tokens: Tensor, config: ShrinkConfig, protected: list[int]) -> _Made:
    """One layer by its tokens [n, D]."""
    was = mixture.layer
    experts, union = was.num_experts, was.union
    facts = ShrunkLayer(mixture.name, (experts, experts), (union, union), len(tokens), protected=protected)
    teacher, left = None, mixture
    if config.specialise:
        need = needs(mixture, tokens)
        facts.dropped = dropped_experts(need, config.tolerance, was.top_k, protected)
        facts.given_up = float(need[facts.dropped].sum())
        left = Mixture(mixture.name, without(mixture, facts.dropped, _share(mixture, tokens)))
    stay = [e for e in range(experts) if e not in facts.dropped]
    if config.experts is not None and config.experts < left.layer.num_experts:
        merges: Merges = merged_groups(alike(left, tokens), config.experts, [stay.index(e) for e in protected])
        facts.groups, facts.losses = merges.groups, merges.losses
        teacher, left = mixture, Mixture(mixture.name, merged_layer(left, merges.groups, tokens))
    facts.experts = experts, left.layer.num_experts
    facts.stored = union, left.layer.union
    return _Made(left.layer, facts, teacher)


def _share(mixture: Mixture, tokens: Tensor) -> Tensor:
    """Shares [K] of the choices that tokens [n, D] make."""
    counts = torch.bincount(mixture.layer.routes(tokens).flatten(), minlength=mixture.layer.num_experts).double()
    return counts / counts.sum().clamp_min(1)

