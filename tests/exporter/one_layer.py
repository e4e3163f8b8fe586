"""A routed layer alone, through the exporter."""

import onnx_ir as ir
import torch

from exporter.graph.trace import to_onnx
from exporter.passes.name_routes import name_routed_nodes


class OneLayer(torch.nn.Module):
    """Reads an image [B, 3, 4, 4] as tokens [B, n, dim] and applies the layer."""

    def __init__(self, layer: torch.nn.Module, dim: int):
        super().__init__()
        self.layer, self.dim = layer, dim

    def forward(self, x):
        return self.layer(x.reshape(x.shape[0], -1, self.dim))


def traced(layer: torch.nn.Module, dim: int) -> ir.Model:
    """The graph of one layer, its routed node named `layer`, before any pass lowers it."""
    graph = to_onnx(OneLayer(layer, dim), (3, 4, 4))
    name_routed_nodes(graph, ["layer"])
    return graph


def show_routes(graph: ir.Model) -> None:
    """Make the layer's routes a second output."""
    graph.graph.outputs.append(next(v for n in graph.graph for v in n.outputs if v.name == "layer/route"))
