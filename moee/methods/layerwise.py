"""Methods that find each layer's experts from its calibration tokens alone; `moee.methods.convert` does the work."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moee.methods.base import Chosen, Method

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


class LayerMethod(Method[Chosen]):
    """`find` is what one of them adds; a plan calls `prepare` once and `apply` for every budget."""

    @abstractmethod
    def find(self, ffn: FFN, sampled: LayerTokens, options: Chosen, report: Reporter, device: torch.device) -> Finding:
        """A layer's groups of tokens, its experts with their report, or the report of a layer that stays dense."""

    def announce(self, counts: Sequence[int], options: Chosen) -> None:
        """Say before the work what will take long. `counts`: calibration tokens of each layer."""

    def convert(self, model: nn.Module, options: Chosen, context: Context) -> Sequence[LayerReport]:
        """As `moee.methods.convert.convert_layers`."""
        from moee.methods.convert import convert_layers

        return convert_layers(self, model, options, context)

    def prepare(self, model: nn.Module, options: Chosen, context: Context) -> Prepared:
        """The first half: calibrate, group each layer's tokens. `model` stays as it is. In a group only rank 0's result is whole;
        the others' holds the layers that they worked on."""
        from moee.methods.convert import group_layers

        return group_layers(self, model, options, context)

    def apply(self, model: nn.Module, prepared: Prepared, options: Chosen, context: Context) -> Sequence[LayerReport]:
        """The second half: choose the neurons, replace the MLPs of `model`, which `prepared` was made from, refit. All ranks call
        it; the reports are whole on rank 0 alone."""
        from moee.methods.convert import install_experts

        return install_experts(model, prepared, options, context)
