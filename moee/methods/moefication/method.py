"""MoEfication as a method among others."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moee.cures import cures
from moee.errors import OutOfReach, UserError
from moee.methods.base import Row, Shares, Variant
from moee.methods.layerwise import LayerMethod
from moee.methods.moefication.options import MoeficationOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moee.calibrate.calibration import LayerTokens
    from moee.methods.exchange import Finding
    from moee.models.ffn import FFN
    from moee.progress import Reporter


_ROW = {"experts": 16, "selector": "router"}
_TOP_K = tuple({"top_k": k} for k in (4, 8, 12, 14))


class MoeficationMethod(LayerMethod[MoeficationOptions]):
    name, options, plugin = "moefication", MoeficationOptions, True
    counterparts = {"clusters": "experts"}
    summary = "disjoint experts of equal size; every token goes to the best few"
    shares: ClassVar[Shares] = "tokens"
    presets: ClassVar = {"moefication": {}}
    variants: ClassVar = {"moefication": Variant({"experts": 32, "selector": "router"})}
    allocations: ClassVar = {"top-k": {}}  # the same number of experts a token in every layer

    rows = {  # type: ignore[assignment]
        "MoEfication, weights": Row({**_ROW, "split": "weights"}, _TOP_K),
        "MoEfication, co-activation": Row({**_ROW, "split": "coactivation"}, _TOP_K),
    }

    def find(
        self, ffn: FFN, sampled: LayerTokens, options: MoeficationOptions, report: Reporter, device: torch.device
    ) -> Finding:
        from moee.methods.moefication.split import find_moefication

        return find_moefication(ffn, sampled, options, device)

    def check(self, model: nn.Module, shape: tuple[int, int, int], options: MoeficationOptions) -> None:
        from moee.mlps.find import find_ffns

        for ffn in find_ffns(model, options.exclude, shape).ffns:
            if options.experts > ffn.hidden:
                raise UserError(
                    f"--experts {options.experts} is more than the {ffn.hidden} neurons of `{ffn.name}`; "
                    + cures("give fewer --experts", "leave it dense with --exclude", elsewhere="choose another method")
                )

    def within(
        self, options: MoeficationOptions, target: float, model: nn.Module, shape: tuple[int, int, int]
    ) -> MoeficationOptions:
        """The most experts a token whose MACs, router included, meet the target. Raises `OutOfReach` if one is too many."""
        from moee.methods.neurons.choice import kept_share

        share = kept_share(model, options.exclude, target, shape, experts=options.experts)
        most = int(share * options.experts + 1e-9)
        if most < 1:
            raise OutOfReach(f"--target-macs {target:g}: not one of {options.experts} experts a token fits")
        return options.model_copy(update={"top_k": min(most, options.experts)})
