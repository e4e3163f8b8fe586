"""CLEAR-MoE as a method among others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from moee.methods.base import Method, Variant
from moee.methods.clear_moe.options import ClearOptions

if TYPE_CHECKING:
    from torch import nn

    from moee.layers.report import LayerReport
    from moee.methods.context import Context


class ClearMethod(Method[ClearOptions]):
    name, also, options, plugin = "clear-moe", ("clear_moe",), ClearOptions, True
    counterparts = {"clusters": "experts"}
    summary = "a low-rank basis that a layer's experts share, and a small low-rank map for each"
    variants: ClassVar = {"clear-moe": Variant({})}
    allocations: ClassVar = {"ranks": {}}  # a rank for every map

    rows: ClassVar = {}  # it has an ablation of its own

    def convert(self, model: nn.Module, options: ClearOptions, context: Context) -> Sequence[LayerReport]:
        """Rank 0 works alone: layers are built front to back on 200 images, so there is little to share."""
        from moee.data.validation import fitted_part
        from moee.methods.clear_moe.convert import convert
        from moee.methods.exchange import by_leader

        def work() -> Sequence[LayerReport]:
            return convert(model, fitted_part(context.data), options, context.report, context.group.device)

        return by_leader(model, context.group, work)
