"""Runners: one interface over everything that executes a model. Context managers, one runtime a file.

A model, a graph or an engine comes in; NumPy arrays go in and out of it.
Imports moee, plugins and engines.
"""

from exporter.runners.base import GraphRunner, Runner
from exporter.runners.onnx_runtime import PROVIDERS, OnnxRunner, provider_works
from exporter.runners.registry import graph_runner
from exporter.runners.tensorrt_engine import EngineRunner, PluginCheck, check_plugin
from exporter.runners.torch_model import TorchRunner

__all__ = [
    "PROVIDERS", "EngineRunner", "GraphRunner", "OnnxRunner", "PluginCheck", "Runner", "TorchRunner", "check_plugin",
    "graph_runner", "provider_works",
]  # fmt: skip
