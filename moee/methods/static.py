"""Static pruning: one expert, whose neurons every token gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moee.calibrate.options import NeuronOptions
from moee.methods.base import Row, Variant
from moee.methods.experts import WIDTHS, NeuronMethod

if TYPE_CHECKING:
    import torch

    from moee.calibrate.calibration import LayerTokens
    from moee.calibrate.grouping import GroupedLayer
    from moee.models.ffn import FFN
    from moee.progress import Reporter


class StaticOptions(NeuronOptions):
    """What the one expert keeps."""


class StaticMethod(NeuronMethod):
    name, options, gated = "static", StaticOptions, True
    summary = "the same neurons for every token: plain pruning, which needs no plugin and takes gated MLPs too"
    presets: ClassVar = {"static": {"target_macs": 0.7, "mlp_floor": 0.5, "width_multiple": WIDTHS}}
    replaced: ClassVar = {"keep": ("target_macs", "mlp_floor"), "target_macs": ("mlp_floor",)}
    variants: ClassVar = {"static": Variant({})}

    rows = {"static pruning": Row({})}  # type: ignore[assignment]

    def find(self, ffn: FFN, sampled: LayerTokens, options: Any, report: Reporter, device: torch.device) -> GroupedLayer:
        from moee.calibrate.grouping import one_group

        return one_group(ffn, sampled, options, device)
