"""CLEAR-MoE as a method among others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moee.layers.report import LayerReport
from moee.methods.base import Context, Method
from moee.methods.clear_moe.config import ClearConfig
from moee.methods.clear_moe.convert import convert
from moee.methods.exchange import share_layers


class ClearMethod(Method[ClearConfig]):
    name, shares, options = "clear-moe", "nothing", ClearConfig

    def convert(self, model: nn.Module, options: ClearConfig, context: Context) -> Sequence[LayerReport]:
        """Rank 0 works alone: layers are built front to back on 200 images, so there is little to share."""
        layers: Sequence[LayerReport] = ()
        with context.group.agreed():
            if context.group.leader:
                layers = convert(model, context.data, options, context.report, context.group.device)
        share_layers(model, context.group)
        return layers
