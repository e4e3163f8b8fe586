"""MoEfication (Zhang et al. 2022): split an MLP's neurons into disjoint experts of equal size, run the best k a token.

It is the same operator as MoEE's: every neuron belongs to one expert, `top_k` > 1, and the output bias is shared out over the
selected experts. Dropped experts can be replaced by their mean, which the bias takes up:

    b_out[e] = (b + sum_f m_f) / top_k - m_e,      m_f = E[output of expert f | f not selected]
"""

from __future__ import annotations

import torch
from torch import Tensor

from moee.calibrate.calibration import CHUNK, LayerTokens, hidden_activations
from moee.calibrate.ridge import solve_ridge
from moee.errors import UserError, chosen
from moee.layers.report import LayerReport
from moee.layers.routed import LOAD_UNIT, Experts
from moee.layers.routing import route
from moee.methods.moefication.options import MoeficationOptions
from moee.models.ffn import FFN
from moee.parallel.devices import CPU

RIDGE = 1e-3  # of the trained router's Gram matrix, share of its mean diagonal
ITERATIONS = 20


def balanced_groups(rows: Tensor, groups: int, seed: int) -> Tensor:
    """Groups [H] int64 of equal size (differing by one at most) for rows [H, F]: k-means, then the assignment that
    minimises the summed squared distance under the size constraint (Hungarian method). Raises `UserError` for more groups than
    rows."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    count = len(rows)
    if not 1 <= groups <= count:
        raise UserError(f"cannot split {count} neurons into {groups} experts; expected 1 to {count}")
    fitted = KMeans(groups, n_init=1, max_iter=ITERATIONS, random_state=seed).fit(rows.numpy())
    centres = torch.from_numpy(fitted.cluster_centers_)
    slots = torch.arange(count) % groups  # the first count % groups groups get one more
    distance = torch.cdist(rows.double(), centres.double()).square()
    which, slot = linear_sum_assignment(distance[:, slots].numpy())
    result = torch.empty(count, dtype=torch.int64)
    result[torch.from_numpy(which)] = slots[torch.from_numpy(slot)]
    return result


def coactivation_features(ffn: FFN, sampled: LayerTokens, components: int) -> Tensor:
    """Leading eigenvectors [H, components] of the normalised co-activation graph: how often two neurons are positive on
    the same token. Its balanced k-means stands in for the graph partition of the paper."""
    device = ffn.w_up.device
    together = torch.zeros(ffn.hidden, ffn.hidden, dtype=torch.float64, device=device)
    for part in torch.arange(sampled.count).split(CHUNK):
        active = (hidden_activations(ffn, sampled.load(part).to(device)) > 0).float()
        together += (active.T @ active).double()
    together.fill_diagonal_(0)
    degree = together.sum(1).clamp(min=1).rsqrt()
    _, vectors = torch.linalg.eigh(together * degree[:, None] * degree)
    return vectors[:, -components:].float().cpu()


def find_moefication(
    ffn: FFN, sampled: LayerTokens, options: MoeficationOptions, device: torch.device = CPU
) -> tuple[Experts, LayerReport]:
    """Disjoint experts of one layer; activations are computed and summed up on `device`. Raises `UserError` if there are more
    experts than neurons."""
    near = ffn.to(device)
    count = min(options.experts, ffn.hidden)
    makers = {"weights": lambda: ffn.w_up, "coactivation": lambda: coactivation_features(near, sampled, count)}
    features = chosen(makers, options.split, "split")()
    group = balanced_groups(features, options.experts, options.seed)
    members = [(group == e).nonzero()[:, 0] for e in range(options.experts)]
    router, bias = _router(near, sampled, members, options)
    top_k = min(options.top_k, options.experts)
    means, share = _means_when_dropped(near, sampled, group, router, bias, top_k)
    outputs = torch.stack([ffn.w_down.double()[:, m] @ means[m] for m in members])
    if options.compensation == "none":
        outputs = torch.zeros_like(outputs)
    b_out = (ffn.b_down.double() + outputs.sum(0)) / top_k - outputs
    widths = [len(m) for m in members]
    experts = Experts(
        router=router, router_bias=bias, w_up=ffn.w_up, b_up=ffn.b_up, w_down=ffn.w_down.T, b_out=b_out.float(),
        neurons=torch.cat(members).to(torch.int32), offsets=torch.tensor([0, *widths]).cumsum(0).to(torch.int32),
        activation=ffn.activation, top_k=top_k, load=tuple((share * LOAD_UNIT).round().long().tolist()),
    )  # fmt: skip
    return experts, LayerReport(
        ffn.name, "routed", ffn.hidden, len(widths), ffn.hidden, widths, share.tolist(), 0.0, sampled.count
    )


def _router(ffn: FFN, sampled: LayerTokens, members: list[Tensor], options: MoeficationOptions) -> tuple[Tensor, Tensor]:
    """Router rows [K, D] and biases [K]: each expert's parameter centre, or a linear map trained (ridge regression) to
    predict the norm-weighted magnitude of the expert's activations."""
    rows, bias = chosen({"centre": _centres, "router": _trained}, options.selector, "selector")(ffn, sampled, members)
    return rows.cpu(), bias.cpu()


def _centres(ffn: FFN, sampled: LayerTokens, members: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.stack([ffn.w_up[m].mean(0) for m in members]), torch.stack([ffn.b_up[m].mean() for m in members])


def _trained(ffn: FFN, sampled: LayerTokens, members: list[Tensor]) -> tuple[Tensor, Tensor]:
    norms, device = ffn.w_down.norm(dim=0), ffn.w_up.device
    gram = torch.zeros(ffn.dim + 1, ffn.dim + 1, dtype=torch.float64, device=device)
    cross = torch.zeros(ffn.dim + 1, len(members), dtype=torch.float64, device=device)
    for part in torch.arange(sampled.count).split(CHUNK):
        tokens = sampled.load(part).to(device)
        weighed = hidden_activations(ffn, tokens).abs() * norms
        target = torch.stack([weighed[:, m].sum(1) for m in members], 1)
        inputs = torch.cat([tokens, torch.ones(len(tokens), 1, device=device)], 1)
        gram += (inputs.T @ inputs).double()
        cross += (inputs.T @ target).double()
    solved = solve_ridge(gram, cross, RIDGE)[0].float()
    return solved[:-1].T.contiguous(), solved[-1].contiguous()


def _means_when_dropped(
    ffn: FFN, sampled: LayerTokens, group: Tensor, router: Tensor, bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Mean activation [H] of each neuron over the tokens that do not select its expert, and each expert's share [K] of
    the tokens' slots."""
    experts, device = len(router), ffn.w_up.device
    router, bias, group = router.to(device), bias.to(device), group.to(device)
    sums = torch.zeros(ffn.hidden, dtype=torch.float64, device=device)
    counts, slots = (torch.zeros(experts, dtype=torch.float64, device=device) for _ in range(2))
    for part in torch.arange(sampled.count).split(CHUNK):
        tokens = sampled.load(part).to(device)
        chosen = torch.zeros(len(tokens), experts, dtype=torch.bool, device=device)
        chosen[torch.arange(len(tokens), device=device)[:, None], route(tokens, router, bias, top_k)] = True
        dropped = ~chosen
        sums += (hidden_activations(ffn, tokens) * dropped[:, group]).double().sum(0)
        counts += dropped.sum(0)
        slots += chosen.sum(0)
    return (sums / counts[group].clamp(min=1)).cpu(), (slots / slots.sum()).cpu()
