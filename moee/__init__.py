"""Mixture of Extracted Experts: find, in a trained Vision Transformer, the experts its activations reveal."""

__version__ = "0.1.0"
