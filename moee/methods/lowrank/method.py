"""Low-rank maps as a method among others: activation-aware truncated SVD (SVD-LLM, ASVD); docs/method.md says what is whose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from moee.methods.base import Method, Variant
from moee.methods.lowrank.options import LowRankOptions

if TYPE_CHECKING:
    from torch import nn

    from moee.layers.report import LayerReport
    from moee.methods.context import Context


class LowRankMethod(Method[LowRankOptions]):
    name, also, options = "lowrank", ("low-rank",), LowRankOptions
    summary = "each map of an MLP as a product of two smaller ones, by an SVD that knows the activations; needs no plugin"
    presets: ClassVar = {"lowrank": {"target_macs": 0.7}}
    replaced: ClassVar = {"keep": ("target_macs",)}
    variants: ClassVar = {"lowrank": Variant({}, usual=False)}
    allocations: ClassVar = {"ranks": {}}  # a rank for every map

    def budget(self, options: LowRankOptions) -> tuple[float, float] | None:
        return None if options.target_macs is None else (options.target_macs, 0.0)

    def check(self, model: nn.Module, shape: tuple[int, int, int], options: LowRankOptions) -> None:
        """A share that leaves an MLP no rank."""
        from moee.methods.lowrank.convert import share_of
        from moee.mlps.find import find_ffns

        share_of(model, find_ffns(model, options.exclude, shape).ffns, shape, options)

    def convert(self, model: nn.Module, options: LowRankOptions, context: Context) -> Sequence[LayerReport]:
        """Rank 0 works alone: layers are built front to back on 200 images, so there is little to share."""
        from moee.data.validation import fitted_part
        from moee.methods.exchange import by_leader
        from moee.methods.lowrank.convert import convert

        def work() -> Sequence[LayerReport]:
            return convert(model, fitted_part(context.data), options, context.report, context.group.device)

        return by_leader(model, context.group, work)
