"""Numerical parity: a graph or an engine against the torch model it was made from, layer by layer, with float64 as yardstick.

An export, its model and images come in; a result with its verdict goes out.
Imports moee, plugins, passes, quantization, forms, runners, graph and timing.
"""

from exporter.forms.form import WeightProblem
from exporter.parity.check import DEFAULT_BATCHES, check_parity
from exporter.parity.layers import Deviation, LayerParity
from exporter.parity.outputs import SAFETY, BatchError
from exporter.parity.result import ParityResult
from exporter.parity.weights import check_weights

__all__ = [
    "DEFAULT_BATCHES",
    "SAFETY",
    "BatchError",
    "Deviation",
    "LayerParity",
    "ParityResult",
    "WeightProblem",
    "check_parity",
    "check_weights",
]
