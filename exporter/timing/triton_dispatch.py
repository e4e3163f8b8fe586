"""The dispatch backend `triton`: residual experts through the routed-FFN kernels `expert_up` and `expert_down`.

Those kernels apply act(x @ up + b) @ down with an activation that is never the identity. Since z = relu(z) - relu(-z), an
expert of q rows B, A is the kernels' expert of 2 q neurons with up rows [B; -B], down rows [A; -A] and ReLU: exact, at twice the
residual's MACs. The kernels take the inner and the outer width apart, so the up map (D to H) fits too; the operator
`moee::MoeeFfn`, which has one width for both, does not, which is why nothing is exported this way (docs/method.md).

CUDA tensors launch the kernels, CPU tensors run them in Triton's interpreter: right, but no speed that means anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moee.errors import UserError
from moee.layers.clear_dispatch import Factors, Plan, register
from plugins.contract import ACTIVATIONS
from plugins.dispatch import launch, sm_of
from plugins.kernels.spec import KernelSpec
from plugins.tactics import SPECS, config, grid_axes
from plugins.workspace import round_up

VARIANT = "bm32"
RELU = ACTIVATIONS.index("relu")


class KernelDispatch:
    """Tokens stay in reading order: the kernels read and write them through each expert's list."""

    name = "triton"

    def permute(self, x: Tensor, routes: Tensor, experts: int) -> tuple[Tensor, Plan]:
        counts = torch.bincount(routes, minlength=experts)
        order = routes.argsort(stable=True)
        return x, Plan(routes, experts, order, counts)

    def residual(self, rows: Tensor, plan: Plan, factors: Factors) -> Tensor:
        if not factors.residual:
            return factors.bias.index_select(0, plan.routes)
        if rows.shape[1] % 16 or factors.outward.shape[1] % 16:
            widths = [rows.shape[1], factors.outward.shape[1]]
            raise UserError(f"backend triton needs widths that are multiples of 16, came {widths}; use sorted or grouped")
        assert plan.counts is not None and plan.order is not None, "made by permute"
        rows, device, experts, width = rows.contiguous(), rows.device, plan.experts, 2 * factors.residual
        buckets = torch.zeros(experts, len(rows), dtype=torch.int32, device=device)
        for e, part in enumerate(plan.order.split(plan.counts.tolist())):
            buckets[e, : len(part)] = part.to(torch.int32)
        both = [torch.cat([side, -side], 1).flatten(0, 1).contiguous() for side in (factors.expert_in, factors.expert_out)]
        sizes: dict[str, Any] = {
            "tokens": len(rows), "experts": experts, "union_size": experts * width, "max_width": width, "top_k": 1,
            "activation": RELU,
        }  # fmt: skip
        y = rows.new_empty(len(rows), factors.outward.shape[1])
        arguments = {
            **sizes, "x": rows, "w_up": both[0], "b_up": rows.new_zeros(experts * width), "w_down": both[1],
            "b_out": factors.bias.detach().contiguous(), "counts": plan.counts.to(torch.int32), "buckets": buckets, "y": y,
            "partial": y, "hidden": rows.new_empty(len(rows), round_up(width, 16)),
            "neurons": torch.arange(experts * width, dtype=torch.int32, device=device),
            "offsets": torch.arange(0, (experts + 1) * width, width, dtype=torch.int32, device=device),
        }  # fmt: skip
        self._launch("expert_up", {**arguments, "dim": rows.shape[1]})
        self._launch("expert_down", {**arguments, "dim": y.shape[1]})
        return y

    @staticmethod
    def _launch(role: str, available: dict[str, Any]) -> None:
        settings = config(role, VARIANT, str(available["x"].dtype).removeprefix("torch."), sm_of(available["x"]))
        spec = SPECS[role]
        grid = KernelSpec(role, spec.fn, spec.reference, grid_axes(role, settings)).launch_grid(available, settings.block)
        launch(spec, settings, grid, {a: available[a] for a in spec.arguments})

    def combine(self, rows: Tensor, plan: Plan) -> Tensor:
        return rows


def install() -> None:
    """Make the backend known under its name."""
    register(KernelDispatch.name, KernelDispatch)
