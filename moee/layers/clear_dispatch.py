"""Dispatch backends: how the experts' part of a low-rank map reaches each token. One interface, interchangeable results.

A map is out = (x @ shared_in.T) @ shared_out + (x @ expert_in[c].T) @ expert_out[c] + bias[c], with c the token's expert.
A backend brings tokens into the order that it likes (`permute`), adds the experts' part to rows in that order
(`residual`), and puts results back (`combine`). The permutation is made once a layer and serves both maps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moee.errors import UserError


@dataclass(frozen=True)
class Plan:
    """`routes` [T] int64; `order` [T] (token at each row) or None for reading order; `counts` tokens an expert; `rows`:
    per expert the row positions, where the backend asked for them."""

    routes: Tensor
    experts: int
    order: Tensor | None = None
    counts: Tensor | None = None
    rows: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Factors:
    """One map: `inward` [r + K q, I] and `outward` [r + K q, O], shared rows first, then q rows an expert; `bias` [K, O]."""

    inward: Tensor
    outward: Tensor
    bias: Tensor
    rank: int
    residual: int

    def shared(self, rows: Tensor) -> Tensor:
        """The part that every token takes: rows [T, I] to [T, O]."""
        return (rows @ self.inward[: self.rank].T) @ self.outward[: self.rank]

    @property
    def expert_in(self) -> Tensor:
        return self.inward[self.rank :].view(len(self.bias), self.residual, self.inward.shape[1])

    @property
    def expert_out(self) -> Tensor:
        return self.outward[self.rank :].view(len(self.bias), self.residual, self.outward.shape[1])


class Backend(Protocol):
    """A dispatch backend; `name` is what `--backend` takes."""

    name: str

    def permute(self, x: Tensor, routes: Tensor, experts: int) -> tuple[Tensor, Plan]:
        """Tokens x [T, D] in the backend's order, and the plan."""

    def residual(self, rows: Tensor, plan: Plan, factors: Factors) -> Tensor:
        """The experts' part with the bias, [T, O], for rows [T, I] in the plan's order."""

    def combine(self, rows: Tensor, plan: Plan) -> Tensor:
        """Rows [T, O] back in reading order."""


class Loop:
    """Expert by expert: find its tokens, gather, multiply, scatter."""

    name = "loop"

    def permute(self, x: Tensor, routes: Tensor, experts: int) -> tuple[Tensor, Plan]:
        return x, Plan(routes, experts, rows=tuple((routes == e).nonzero()[:, 0] for e in range(experts)))

    def residual(self, rows: Tensor, plan: Plan, factors: Factors) -> Tensor:
        parts = [
            torch.addmm(factors.bias[e], rows[at] @ factors.expert_in[e].T, factors.expert_out[e])
            for e, at in enumerate(plan.rows)
        ]
        return torch.cat(parts).index_select(0, torch.cat(plan.rows).argsort())

    def combine(self, rows: Tensor, plan: Plan) -> Tensor:
        return rows


class Sorted:
    """Sort the tokens once by expert; experts are contiguous segments after that."""

    name = "sorted"

    def permute(self, x: Tensor, routes: Tensor, experts: int) -> tuple[Tensor, Plan]:
        order = routes.argsort(stable=True)
        return x.index_select(0, order), Plan(routes, experts, order, torch.bincount(routes, minlength=experts))

    def residual(self, rows: Tensor, plan: Plan, factors: Factors) -> Tensor:
        assert plan.counts is not None, "sorted plans count their tokens"
        segments = rows.split(plan.counts.tolist())
        return torch.cat([
            torch.addmm(factors.bias[e], part @ factors.expert_in[e].T, factors.expert_out[e])
            for e, part in enumerate(segments)
        ])  # fmt: skip

    def combine(self, rows: Tensor, plan: Plan) -> Tensor:
        assert plan.order is not None, "sorted plans hold their order"
        inverse = torch.empty_like(plan.order)
        inverse[plan.order] = torch.arange(len(plan.order), device=rows.device)
        return rows.index_select(0, inverse)


class Grouped(Sorted):
    """As `sorted`, with torch's grouped matrix product in the place of the loop over segments."""

    name = "grouped"

    def residual(self, rows: Tensor, plan: Plan, factors: Factors) -> Tensor:
        assert plan.counts is not None and plan.order is not None, "sorted plans hold counts and order"
        ends = plan.counts.cumsum(0).to(torch.int32)
        bias = factors.bias.index_select(0, plan.routes.index_select(0, plan.order))
        if not factors.residual:
            return bias
        inner = torch.nn.functional.grouped_mm(rows, factors.expert_in.transpose(1, 2), offs=ends)
        return torch.nn.functional.grouped_mm(inner, factors.expert_out, offs=ends) + bias


class Masked:
    """No dispatch: every expert's q coefficients for every token, all but the chosen ones set to zero. K q more columns in
    two dense products, and no gather or scatter."""

    name = "masked"

    def permute(self, x: Tensor, routes: Tensor, experts: int) -> tuple[Tensor, Plan]:
        return x, Plan(routes, experts)

    def residual(self, rows: Tensor, plan: Plan, factors: Factors) -> Tensor:
        bias = factors.bias.index_select(0, plan.routes)
        if not factors.residual:
            return bias
        others = torch.nn.functional.one_hot(plan.routes, plan.experts) == 0
        coefficients = (rows @ factors.inward[factors.rank :].T).view(len(rows), plan.experts, factors.residual)
        return torch.addmm(bias, coefficients.masked_fill(others[:, :, None], 0).flatten(1), factors.outward[factors.rank :])

    def combine(self, rows: Tensor, plan: Plan) -> Tensor:
        return rows


BACKENDS: dict[str, Callable[[], Backend]] = {"loop": Loop, "sorted": Sorted, "masked": Masked}
if hasattr(torch.nn.functional, "grouped_mm"):
    BACKENDS["grouped"] = Grouped


def register(name: str, make: Callable[[], Backend]) -> None:
    """Add a backend; the kernels' one lives outside this package, which imports no kernels."""
    BACKENDS[name] = make


def backend(name: str) -> Backend:
    """A backend by name. Raises `UserError` for one that this build does not have."""
    if name not in BACKENDS:
        raise UserError(f"dispatch backend {name!r} is not available here; expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]()


def apply_ffn(
    x: Tensor, routes: Tensor, up: Factors, down: Factors, act: Callable[[Tensor], Tensor], *, via: Backend
) -> Tensor:
    """A whole layer: tokens x [T, D] with their experts [T] to [T, D]."""
    rows, plan = via.permute(x, routes, len(up.bias))
    hidden = act(up.shared(rows) + via.residual(rows, plan, up))
    return via.combine(down.shared(hidden) + via.residual(hidden, plan, down), plan)
