"""Which neurons an expert keeps, by backward elimination that knows the refit.

A rank by a criterion looks at one neuron at a time. But the refit makes good what the others can: of two neurons that fire alike,
one is enough. Removing neuron j from a least-squares fit on activations with the Gram matrix G, and correcting the rest, adds
|w_j|^2 / [G^-1]_jj to the squared error, w_j being the neuron's corrected output weights: the optimal brain surgeon
(Hassibi and Stork 1993), for whole neurons as in ZipLM (Kurtic et al. 2023, arXiv 2302.04089) and OSSCAR (Meng et al. 2024,
arXiv 2403.12983). Errors of the layer's output are measured by how much the model's output minds them, the second moment of the
gradients there (`moee.calibrate.sensitivity`): w_j is taken in that metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moee.calibrate.calibration import CHUNK, hidden_activations
from moee.calibrate.layer_sums import SAMPLE, LayerPart
from moee.calibrate.ridge import add_upper, mirrored
from moee.layers.routed import NeuronLayer
from moee.models.ffn import FFN
from moee.parallel.group import SOLO, Group, Parcel
from moee.parallel.ordered import OrderedSum

STEPS = 96  # in which all neurons would be removed
ENOUGH = 4  # tokens a neuron that an expert's Gram matrix is made of, at least, where it has as many
COMPACT = 0.75  # of the neurons: when so few are left, matrices are made that hold no others
RIDGE = 0.01  # of the mean diagonal, as the refit takes for layers of this size


Rows = dict[int, Tensor]  # of a part's tokens, by their expert


@dataclass(frozen=True)
class Elimination:
    """How a refit chooses neurons first. `rechoose`: a layer, its dense original, the neurons that each expert is to keep and the
    means [K, H] of its activations to the layer with these. `metrics` [D, D], by layer: of errors of its output."""

    rechoose: Callable[[NeuronLayer, FFN, list[Tensor], Tensor], NeuronLayer]
    metrics: Mapping[str, Tensor]

    def chosen(self, layer: NeuronLayer, ffn: FFN, parts: Sequence[LayerPart], group: Group) -> NeuronLayer:
        """`layer` with the neurons that elimination leaves; as it is where activations are not finite."""
        found = eliminated(layer, ffn, parts, self.metrics.get(ffn.name), group)
        if found is None:
            return layer
        with torch.inference_mode(False), torch.no_grad():  # its parameters are to be trained
            chosen = self.rechoose(layer, ffn, *found)
        chosen.bypassed = layer.bypassed
        return chosen


def eliminate(
    gram: Tensor, weight: Tensor, count: int, *, block: int | None = None, ridge: float = RIDGE
) -> Tensor:
    """Ascending ids [count] of the neurons that stay.

    `gram` [H, H]: of their centred activations; `weight` [H, D]: what each adds to the output. `block` are removed at once
    (default: a `STEPS`th of them). Ties go to the lower id. Raises `ValueError` for a Gram matrix that is not finite.
    """
    hidden = len(gram)
    level = float(gram.diagonal().double().mean())
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix is not finite")
    if count >= hidden or level <= 0:  # nothing to remove, or all activations are constant
        return torch.arange(min(count, hidden), device=gram.device)
    damped = gram + ridge * level * torch.eye(hidden, dtype=gram.dtype, device=gram.device)
    inverse, rest = torch.cholesky_inverse(torch.linalg.cholesky(damped)), weight.to(gram.dtype).clone()
    block = block or max(1, hidden // STEPS)
    ids, alive = torch.arange(hidden, device=gram.device), torch.ones(hidden, dtype=torch.bool, device=gram.device)
    for left in range(hidden - count, 0, -block):
        cost = rest.square().sum(1) / inverse.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
        cost[~alive] = torch.inf
        gone = cost.sort(stable=True).indices[: min(block, left)]
        columns = inverse[:, gone]
        solved = torch.linalg.solve(inverse[gone][:, gone], torch.cat([rest[gone], inverse[gone]], 1))
        rest.addmm_(columns, solved[:, : rest.shape[1]], alpha=-1)
        inverse.addmm_(columns, solved[:, rest.shape[1] :], alpha=-1)
        alive[gone] = False
        if count + left - block < COMPACT * len(alive):
            ids, rest, inverse, alive = ids[alive], rest[alive], inverse[alive][:, alive], alive[alive]
    return ids[alive]


def eliminated(
    layer: NeuronLayer, ffn: FFN, parts: Sequence[LayerPart], metric: Tensor | None = None, group: Group = SOLO
) -> tuple[list[Tensor], Tensor] | None:
    """Which neurons of its dense original `ffn` each expert of `layer` should keep, ascending, as many as it keeps now; and the
    means [K, H] of its activations. By this rank's parts of the tokens; every rank gets the same. An expert without a token
    goes by all tokens. `metric` [D, D]: of errors of the output; without it they count alike. None where activations are not
    finite."""
    with group.agreed():
        rows = [{e: rows for e, rows, _ in part.rows(layer)} for part in parts]
    means, seen = _sampled_means(ffn, parts, rows, layer.num_experts, group)
    strides = (seen / (ENOUGH * ffn.hidden)).long().clamp(min=1).tolist()
    weight = ffn.w_down.T if metric is None else ffn.w_down.T @ root_of(metric).to(ffn.w_down)
    overall = torch.zeros(ffn.hidden, ffn.hidden, device=weight.device)
    counts = torch.zeros_like(seen)
    kept: dict[int, Tensor] = {}
    finite = True
    for e in seen.nonzero()[:, 0].tolist():
        some = [each[e][:: strides[e]] if e in each else None for each in rows]
        sums = _expert_sums(ffn, parts, some, means[e].float(), group)
        with group.agreed():
            if group.leader and finite:
                counts[e], off = sums["count"], sums["sum"] / sums["count"]
                means[e] = means[e].float() + off
                gram = mirrored(sums["gram"]) - (counts[e] * torch.outer(off, off)).float()
                if finite := bool(torch.isfinite(gram).all()):
                    kept[e] = eliminate(gram / float(counts[e]), weight, layer.widths[e])
                    overall += gram
    with group.agreed():
        if group.leader and finite:
            for e in (seen == 0).nonzero()[:, 0].tolist():
                kept[e] = eliminate(overall, weight, layer.widths[e])
                means[e] = (means * counts[:, None]).sum(0) / counts.sum()
    parcel = Parcel(finite, {"means": means, **{str(e): ids for e, ids in kept.items()}} if finite else {})
    parcel = group.broadcast(parcel)
    if not parcel.body:
        return None
    return [parcel.tensors[str(e)].to(weight.device) for e in range(len(means))], parcel.tensors["means"].to(weight.device)


def root_of(metric: Tensor) -> Tensor:
    """A matrix L [D, D] with L L' the metric, up to a factor by which its entries are of usual size."""
    values, vectors = torch.linalg.eigh(metric.double())
    root = vectors * values.clamp(min=0).sqrt()
    return root / root.norm().clamp(min=1e-300) * len(root) ** 0.5


def _sampled_means(
    ffn: FFN, parts: Sequence[LayerPart], rows: Sequence[Rows], experts: int, group: Group
) -> tuple[Tensor, Tensor]:
    """Means [K, H] of each expert's activations by one in `SAMPLE` of its tokens, and how many it has in all [K], on every rank:
    sums of what is left when the means are taken off lose nothing to rounding."""
    exact = torch.zeros(0, dtype=torch.float64, device=ffn.w_down.device)
    sums = OrderedSum(group)
    with group.agreed():
        for part, own in zip(parts, rows, strict=True):
            total, count, rows_of = exact.new_zeros(experts, ffn.hidden), exact.new_zeros(experts), exact.new_zeros(experts)
            for e, some in own.items():
                few, each = some[::SAMPLE], part.counts[some[::SAMPLE]]
                total[e] = (hidden_activations(ffn, part.tokens[few]) * each[:, None]).sum(0, dtype=torch.float64)
                count[e], rows_of[e] = each.sum(dtype=torch.float64), len(some)
            sums.add({"sum": total, "count": count, "rows": rows_of})
    whole = group.broadcast(Parcel(None, sums.total())).tensors
    total, count, rows_of = (whole[name].to(exact.device) for name in ("sum", "count", "rows"))
    return total / count.clamp(min=1e-9)[:, None], rows_of


def _expert_sums(
    ffn: FFN, parts: Sequence[LayerPart], rows: Sequence[Tensor | None], shift: Tensor, group: Group
) -> dict[str, Tensor]:
    """Of an expert's activations less `shift` [H], on rank 0: the upper part of their Gram matrix [H, H], their sum [H] and what
    its tokens count for, both float64. `rows`: its tokens in each part."""
    sums, device = OrderedSum(group), ffn.w_down.device
    with group.agreed():
        for part, own in zip(parts, rows, strict=True):
            gram = torch.zeros(ffn.hidden, ffn.hidden, device=device)
            total, count = torch.zeros(ffn.hidden, dtype=torch.float64, device=device), 0.0
            for few in () if own is None else own.split(CHUNK):
                each = part.counts[few]
                hidden = hidden_activations(ffn, part.tokens[few]) - shift
                weighed = hidden * each[:, None]
                add_upper(gram, hidden, weighed)
                total += weighed.sum(0, dtype=torch.float64)
                count += float(each.sum(dtype=torch.float64))
            sums.add({"gram": gram, "sum": total, "count": torch.tensor(count, dtype=torch.float64, device=device)})
    return {name: value.to(device) for name, value in sums.total().items()}
