"""Which layers CLEAR-MoE converts, and at which ranks: by hand, by kept energy or by a budget of MACs."""

from __future__ import annotations

from torch import nn

from moee.errors import UserError
from moee.measure.metrics import dense_macs, original_macs, tokens_per_image
from moee.methods.clear_moe.analysis import Analysis, Ranks
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.clear_moe.ranks import LayerCost, ranks_for_budget
from moee.models.model import Shape


def choose_ranks(model: nn.Module, found: list[Analysis], shape: Shape, config: ClearOptions) -> None:
    """Fill in the ranks of the layers to convert, and the reason of the others."""
    tokens = tokens_per_image(model, [a.ffn.name for a in found], shape)
    costs = [
        LayerCost(
            dense=2.0 * tokens[a.ffn.name] * a.ffn.dim * a.ffn.hidden,
            unit=float(tokens[a.ffn.name]) * (a.ffn.dim + a.ffn.hidden),
            router=float(tokens[a.ffn.name]) * a.router.macs,
            gain=_gain(a),
        )
        for a in found
    ]
    order = sorted(range(len(found)), key=lambda i: -found[i].score.score if found[i].score else 0.0)  # type: ignore[union-attr]
    picked = sorted(order[: config.layers])
    macs, whole = float(dense_macs(model, shape)), float(original_macs(model, shape))
    for i, a in enumerate(found):
        a.reason = "dense: not selected" if i not in picked else "dense: would not get cheaper"
    if config.rank is not None:
        ranks: Ranks = (config.rank, config.residual_rank or 0) * 2  # type: ignore[assignment]
        if config.target_macs is not None:
            picked = _until_budget(found, costs, order, sum(ranks), macs, whole, config.target_macs)
        for i in picked:
            found[i].ranks = ranks
        return
    tables = [found[i].tables for i in picked]
    assert all(t is not None for t in tables), "the first pass made them, since no rank was given"
    if config.target_macs is not None:
        other = macs - sum(costs[i].dense for i in picked)
        pairs = [t for t in tables if t is not None]
        solved = ranks_for_budget(pairs, [costs[i] for i in picked], other, config.target_macs * whole, config.residual_rank)
    else:
        energy = config.kept_energy
        assert energy is not None, "the configuration gives a rank, an energy or a budget"
        solved = []
        for i, pair in zip(picked, tables, strict=True):
            assert pair is not None, "see above"
            r = (*pair[0].for_energy(energy, config.residual_rank), *pair[1].for_energy(energy, config.residual_rank))
            solved.append(r if costs[i].of(sum(r)) < costs[i].dense else None)
    for i, r4 in zip(picked, solved, strict=True):
        found[i].ranks = r4


def _gain(a: Analysis) -> float:
    """Squared change of the model's output for one unit of block-output error, from the layer's measured sensitivity."""
    if a.score is None or a.tables is None:
        return 1.0
    rank = a.score.rank
    error = 0.0
    for table in a.tables:
        nearest = min(range(len(table.ranks)), key=lambda i: abs(table.ranks[i] - rank))  # noqa: B023
        error += table.total * float(table.loss[nearest, 0])
    return a.score.sensitivity**2 / max(error, 1e-30)


def _until_budget(
    found: list[Analysis], costs: list[LayerCost], order: list[int], units: int, macs: float, whole: float, target: float
) -> list[int]:
    """The fewest layers, best scores first, that bring a model of `macs` within `target` of `whole`, at a rank given by hand."""
    picked: list[int] = []
    total = macs
    for i in order:
        if total <= target * whole:
            break
        if costs[i].of(units) < costs[i].dense:
            total += costs[i].of(units) - costs[i].dense
            picked.append(i)
        else:
            found[i].reason = "dense: would not get cheaper"
    if total > target * whole:
        raise UserError(
            f"--target-macs {target}: this --rank reaches {total / whole:.3f} of the dense model's multiply-accumulates with "
            "every layer converted; lower --rank or raise the target"
        )
    return sorted(picked)
