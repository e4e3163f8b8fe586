"""8-bit weights and activations for the dense parts of a model: linear layers and convolutions outside the routed layers."""

from exporter.quantization.calibrate import CALIBRATION_IMAGES, MIN_SQNR_DB, calibrate
from exporter.quantization.modules import QuantConv2d, Quantization, QuantLinear, quantizable, quantized

__all__ = [
    "CALIBRATION_IMAGES",
    "MIN_SQNR_DB",
    "QuantConv2d",
    "QuantLinear",
    "Quantization",
    "calibrate",
    "quantizable",
    "quantized",
]
