"""Experts of neurons (MoEE): groups of a layer's tokens, and for each the neurons that matter to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from moee.calibrate.options import MEASURED, GroupingOptions, NeuronOptions
from moee.clustering.options import PARTITIONS
from moee.errors import UserError
from moee.methods.base import Row, Shares, Values, Variant
from moee.methods.layerwise import LayerMethod

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moee.calibrate.calibration import LayerTokens
    from moee.layers.report import LayerReport
    from moee.methods.context import Context
    from moee.methods.convert import Prepared
    from moee.methods.exchange import Finding
    from moee.models.ffn import FFN
    from moee.progress import Reporter

log = logging.getLogger("moee")
WIDTHS = 16  # multiples that tensor cores take in fp16 (8) and int8 (16), and that fill a vector of AVX-512 in float32
MANY_TOKENS = 30_000  # HDBSCAN's time grows with their square: above it a layer takes minutes on two cores
# How a plan spends a budget: every expert keeps the same share, or all neurons of the model are held against one threshold.
ALLOCATIONS: dict[str, Values] = {
    "share": {"criterion": "output_variance", "allocation": "expert"},
    "sensitivity": {"criterion": "sensitivity", "allocation": "model"},
    "weight": {"criterion": "weight", "allocation": "expert"},  # from here on other people's criteria, to compare with
    "taylor": {"criterion": "taylor", "allocation": "model"},
    "atomic": {"criterion": "atomic", "allocation": "model"},
}
USUAL = ("share", "sensitivity")  # those that a plan tries when nobody says which


class ExpertsOptions(NeuronOptions, GroupingOptions):
    """How experts are found, and what they keep."""

    one_expert: tuple[str, ...] = Field(
        (), description="MLP that gets one expert, as with static pruning, since several are slower there; may be repeated"
    )

    @model_validator(mode="after")
    def _measured_where_routed(self) -> ExpertsOptions:
        if self.criterion in MEASURED and self.statistics == "cluster":
            raise ValueError(f"--criterion {self.criterion} is measured on routed tokens; use --statistics routed")
        return self


class NeuronMethod(LayerMethod[Any]):
    """What experts and static pruning share: a layer's groups serve every budget, and a sensitivity may choose the neurons."""

    shares: ClassVar[Shares] = "groups"
    allocations = ALLOCATIONS

    def check(self, model: nn.Module, shape: tuple[int, int, int], options: Any) -> None:
        named = {"one_expert": tuple(getattr(options, "one_expert", ())), "mac_time": tuple(options.mac_times())}
        if not any(named.values()):
            return
        from moee.mlps.find import find_ffns

        known = [ffn.name for ffn in find_ffns(model, options.exclude, shape, gated=self.gated).ffns]
        for option, names in named.items():
            if unknown := [name for name in names if name not in known]:
                flag = option.replace("_", "-")
                raise UserError(f"--{flag} {unknown[0]} is no MLP that is cut; those are {', '.join(known) or 'none'}")

    def budget(self, options: NeuronOptions) -> tuple[float, float] | None:
        return None if options.target_macs is None else (options.target_macs, options.mlp_floor or 0.0)

    def prepare(self, model: nn.Module, options: Any, context: Context) -> Prepared:
        prepared = super().prepare(model, options, context)
        self._measure(model, prepared, options, context)
        return prepared

    def apply(self, model: nn.Module, prepared: Prepared, options: Any, context: Context) -> Sequence[LayerReport]:
        self._measure(model, prepared, options, context)
        return super().apply(model, prepared, options, context)

    def _measure(self, model: nn.Module, prepared: Prepared, options: Any, context: Context) -> None:
        """The error that dropping each neuron makes, once it is asked for."""
        from moee.methods.convert import measured_by, sensitivity_of
        from moee.space.machine import give_back

        kind = measured_by(options)
        if (options.criterion in MEASURED or options.neurons == "eliminated") and kind not in prepared.measured:
            prepared.measured[kind] = sensitivity_of(model, prepared, options, context)
            give_back()


class ExpertsMethod(NeuronMethod):
    name, also, options, plugin = "experts", ("moee",), ExpertsOptions, True
    counterparts = {"experts": "clusters"}
    summary = "experts of neurons, found by clustering each layer's tokens; every token goes to one"
    presets: ClassVar = {
        "deploy": {
            "clustering": "kmeans", "clusters": 4, "components": 50, "cluster_tokens": 6000, "target_macs": 0.7, "mlp_floor": 0.5,
            "width_multiple": WIDTHS,
        },
        "compensated": {},
        "paper": {"criterion": "variance", "keep": 0.80, "statistics": "cluster", "compensation": "none"},
    }
    replaced: ClassVar = {
        "keep": ("target_macs", "mlp_floor"), "target_macs": ("mlp_floor",), "clustering": ("clusters", "components"),
    }  # fmt: skip
    variants: ClassVar = {
        "hdbscan": Variant({"clustering": "hdbscan"}),
        "kmeans-4": Variant({"clustering": "kmeans", "clusters": 4, "components": 50}, usual=False),  # for few tokens
        "kmeans-8": Variant({"clustering": "kmeans", "clusters": 8, "components": 50}),
        "kmeans-32": Variant({"clustering": "kmeans", "clusters": 32, "components": 50}),
        "kmeans-64": Variant({"clustering": "kmeans", "clusters": 64, "components": 50}, usual=False),  # pays on varied data only
    }

    rows = {"MoEE": Row({})}  # type: ignore[assignment]

    def find(self, ffn: FFN, sampled: LayerTokens, options: Any, report: Reporter, device: torch.device) -> Finding:
        from moee.calibrate.grouping import find_routes, one_group

        if ffn.name in options.one_expert:
            return one_group(ffn, sampled, options, device)
        return find_routes(ffn, sampled, options, report, device)

    def announce(self, counts: Sequence[int], options: ExpertsOptions) -> None:
        dense = options.clustering == "hdbscan" or (options.clustering in PARTITIONS and options.clusters is None)
        most = min(max(counts, default=0), options.cluster_tokens)
        if dense and most > MANY_TOKENS:
            log.info(
                "%s tokens a layer are clustered, minutes a layer; --cluster-tokens 6000 takes seconds and changes little",
                f"{most:,}",
            )
