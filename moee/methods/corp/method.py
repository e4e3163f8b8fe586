"""CORP as a method among others (Zhang and Yang 2026, arXiv 2602.05243); docs/method.md says what of it is reproduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from moee.methods.base import Method, Variant
from moee.methods.corp.options import CorpOptions

if TYPE_CHECKING:
    from torch import nn

    from moee.layers.report import LayerReport
    from moee.methods.context import Context


class CorpMethod(Method[CorpOptions]):
    name, options, gated = "corp", CorpOptions, True
    summary = "CORP: neurons and dimensions of the heads of little energy go, and ridge regressions make up for them"
    presets: ClassVar = {"corp": {"target_macs": 0.7}}
    replaced: ClassVar = {"keep": ("target_macs",)}
    variants: ClassVar = {"corp": Variant({}, usual=False)}
    allocations: ClassVar = {"equal": {}}  # one share for every layer

    def obstacle(self, options: CorpOptions, before: Sequence[str]) -> str:
        if before and options.corp_attention == "cut":
            return "corp cuts the heads itself; leave --attention-macs and --token-macs out, or give --corp-attention whole"
        return ""

    def check(self, model: nn.Module, shape: tuple[int, int, int], options: CorpOptions) -> None:
        from moee.methods.corp.budget import Costs

        costs = Costs.of(model, options, shape)
        if options.target_macs is not None:
            costs.keep_for(options.target_macs)

    def convert(self, model: nn.Module, options: CorpOptions, context: Context) -> Sequence[LayerReport]:
        """Rank 0 works alone: one forward pass over the images, then a solve a layer."""
        from moee.methods.corp.convert import convert, share
        from moee.methods.exchange import by_leader

        return by_leader(model, context.group, lambda: convert(model, options, context), share)

    def within(self, options: CorpOptions, target: float, model: nn.Module, shape: tuple[int, int, int]) -> CorpOptions:
        """The largest share whose MACs meet the target."""
        from moee.methods.corp.budget import Costs

        keep = Costs.of(model, options, shape).keep_for(target)
        return options.model_copy(update={"keep": keep, "target_macs": None})
