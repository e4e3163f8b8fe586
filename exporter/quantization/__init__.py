"""8-bit weights and activations for the dense parts of a model: linear layers and convolutions outside the routed layers.

A model and images come in; scales, and the model with int8 layers, go out.
Imports moee.
"""

from exporter.quantization.calibrate import CALIBRATION_IMAGES, MIN_SQNR_DB, calibrate
from exporter.quantization.modules import QuantConv2d, QuantLinear, quantizable, quantized

__all__ = [
    "CALIBRATION_IMAGES",
    "MIN_SQNR_DB",
    "QuantConv2d",
    "QuantLinear",
    "calibrate",
    "quantizable",
    "quantized",
]
