"""ONNX graphs of a model: traced, written, read safely, in one precision.

A model comes in; graphs with their manifest go out.
Imports moee, plugins, passes, quantization, forms and runners.
"""
