"""Which neurons the experts keep, and what that costs: by the share of the criterion, or by a budget of MACs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moee.calibrate.grouping import GroupedLayer
from moee.calibrate.options import MEASURED, NeuronOptions
from moee.calibrate.selection import keep_by_share, select_neurons
from moee.cures import cures
from moee.data.image_set import ImageSet, batches, image_shape
from moee.errors import OutOfReach
from moee.measure.metrics import original_macs, saved_macs, tokens_per_image
from moee.methods.neurons.allocation import Candidate, allocate
from moee.mlps.find import find_ffns

log = logging.getLogger("moee")
SHORT = 0.005  # of the model's MACs, by which a floor may miss a target without a word
SHARE_STEPS = 24  # bisections of the kept share: finer than one neuron


def choose_neurons(
    model: nn.Module, routed: dict[str, GroupedLayer], error: dict[str, Tensor], data: ImageSet, config: NeuronOptions
) -> dict[str, list[Tensor]]:
    """Per layer and expert, the ascending ids of the neurons to keep; a layer that would cost as much as dense is left out.

    `error` [K, H] a layer is needed by the criteria of gradients alone.
    """
    if not routed:
        return {}
    if config.target_macs is None and config.allocation == "expert":
        return {name: _by_expert(r, error.get(name), config, config.keep) for name, r in routed.items()}
    shape = image_shape(next(batches(data, 1)).images)
    tokens = tokens_per_image(model, routed, shape)
    dense = {n: tokens[n] * r.ffn.macs for n, r in routed.items()}
    budget = None
    if config.target_macs is not None:
        whole, saved = original_macs(model, shape), saved_macs(model, shape)
        budget = ffn_budget(whole, sum(dense.values()), config.target_macs, saved, floor=config.mlp_floor or 0.0)
        left = (whole - saved - sum(dense.values()) + budget) / whole
        if left > config.target_macs + SHORT:
            log.info(
                "--target-macs %g is not reached: --mlp-floor %g leaves %.1f %% of the MACs; give a smaller floor, or a smaller "
                "--attention-macs", config.target_macs, config.mlp_floor, 100 * left,
            )  # fmt: skip
    if config.allocation == "expert":
        assert budget is not None
        kept = _share_for(budget, routed, error, tokens, config)
    else:
        times = config.mac_times()
        candidates = {
            n: Candidate(
                error[n], r.share, tokens[n], r.ffn.neuron_macs, r.ffn.routing_macs(len(error[n])), times.get(n, 1.0),
                config.multiple_of(r.ffn.hidden),
            )
            for n, r in routed.items()
        }
        kept = allocate(candidates, budget, config.keep).kept
    return {n: k for n, k in kept.items() if _macs(routed[n], k, tokens[n]) < dense[n]}


def _by_expert(routed: GroupedLayer, error: Tensor | None, config: NeuronOptions, keep: float) -> list[Tensor]:
    """Each expert's neurons that hold the share `keep` of the criterion in that expert."""
    multiple = config.multiple_of(routed.ffn.hidden)
    if config.criterion in MEASURED:
        assert error is not None
        return [keep_by_share(row, keep, multiple) for row in error]
    return select_neurons(routed.moments, routed.ffn, config.criterion, keep, seed=config.seed, multiple=multiple)


def _macs(routed: GroupedLayer, kept: list[Tensor], tokens: int) -> float:
    """MACs an image of a layer with the given neurons, router included."""
    widths = torch.tensor([len(k) for k in kept], dtype=torch.float64)
    return tokens * (routed.ffn.routing_macs(len(kept)) + routed.ffn.neuron_macs * float(widths @ routed.share))


def _share_for(
    budget: float, routed: dict[str, GroupedLayer], error: dict[str, Tensor], tokens: dict[str, int], config: NeuronOptions
) -> dict[str, list[Tensor]]:
    """The largest share `keep` whose experts cost at most `budget` MACs an image, by bisection."""
    low, high = 0.0, 1.0
    best = {name: _by_expert(r, error.get(name), config, 1e-9) for name, r in routed.items()}
    for _ in range(SHARE_STEPS):
        middle = (low + high) / 2
        kept = {name: _by_expert(r, error.get(name), config, middle) for name, r in routed.items()}
        if sum(_macs(routed[n], k, tokens[n]) for n, k in kept.items()) <= budget:
            best, low = kept, middle
        else:
            high = middle
    return best


def kept_share(
    model: nn.Module, exclude: tuple[str, ...], target: float, shape: tuple[int, int, int], *, experts: int = 1
) -> float:  # fmt: skip
    """The share of its MLPs' neurons that a token may use for `model`, on images of `shape`, to end at the share `target` of the
    dense MACs, when each MLP but those of `exclude` gets a router of so many `experts`. Raises `OutOfReach` if none are left."""
    ffns = {ffn.name: ffn for ffn in find_ffns(model, exclude).ffns}
    tokens = tokens_per_image(model, ffns, shape)
    whole = sum(tokens[name] * ffn.macs for name, ffn in ffns.items())
    routers = sum(tokens[name] * ffn.routing_macs(experts) for name, ffn in ffns.items())
    budget = ffn_budget(original_macs(model, shape), whole, target, saved_macs(model, shape))
    if budget <= routers:
        raise OutOfReach(f"--target-macs {target:g}: routers of {experts} experts take all that is left to the MLPs; give more")
    return min(1.0, (budget - routers) / whole)


def ffn_budget(
    total: int, ffn: int, target: float, saved: int = 0, *, floor: float = 0.0, further: Sequence[str] = ()
) -> float:
    """MACs left to the routed layers so that a model of `total` MACs, `ffn` of them in these layers, ends at the share `target`,
    when narrower attention and merged tokens have `saved` some already; at least the share `floor` of theirs. Raises
    `OutOfReach` if nothing would be left; it advises `further`, the options by which this model saves more.
    """
    budget = ffn - ((1 - target) * total - saved)
    if budget >= ffn:
        raise OutOfReach(
            f"--target-macs {target:g}: narrower attention or merged tokens alone leave {1 - saved / total:.2f} of the MACs, "
            "so nothing is to be cut from the MLPs; "
            + cures("give a smaller share", "a larger --attention-macs", "a larger --token-macs")
        )
    budget = max(budget, floor * ffn)
    if budget <= 0:
        raise OutOfReach(
            f"--target-macs {target:g}: the routed MLPs hold {ffn / total:.0%} of the MACs, so the result stays above "
            f"{1 - (ffn + saved) / total:.2f}; give a larger share{''.join(f', or {option}' for option in further)}"
        )
    return budget
