"""`runtime.onnx`: the portable graph with `MoeeFfn` nodes, for ONNX Runtime on the CPU with the operator's library (plugins/cpu).

1. Layers of several experts stay nodes; all others are as in the portable graph.
2. The weights are those of the other graphs, in `moee.data`.
3. It serves where the library can be had; elsewhere the portable graph is taken, and that is said.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter.passes.clear import Form, lower_clear_ffn
from exporter.runners.operator_cache import operator_or_reason
from moee.errors import UserError
from moee.kinds.registry import kind_of
from moee.layers.routed import RoutedLayer
from moee.progress import Reporter, silent
from plugins.contract import CPU_ACTIVATIONS

log = logging.getLogger("moee")
RUNTIME, PORTABLE = "runtime.onnx", "portable.onnx"
KEY = "runtime"  # in the manifest's graphs
PRECISION, PROVIDER = "fp32", "cpu"


def _nodes(layers: Mapping[str, RoutedLayer]) -> list[RoutedLayer]:
    """The layers that would be nodes of the graph."""
    return [layer for layer in layers.values() if kind_of(layer).name == "moee" and layer.num_experts > 1]


def refuse_runtime(layers: Mapping[str, RoutedLayer], precision: str) -> None:
    """Raise `UserError` for an export that the operator cannot serve."""
    if precision != PRECISION:
        raise UserError(f"--runtime-ops: the operator takes {PRECISION}, came --precision {precision}; leave one of them out")
    nodes = _nodes(layers)
    if not nodes:
        raise UserError("--runtime-ops: no layer of the model has several experts, which the operator is for; leave it out")
    if lacking := {layer.activation for layer in nodes} - set(CPU_ACTIVATIONS):
        raise UserError(
            f"--runtime-ops: the operator takes the activations {', '.join(CPU_ACTIVATIONS)}, and the model has "
            f"{', '.join(sorted(lacking))}; leave it out"
        )


def serves(layers: Mapping[str, RoutedLayer], precision: str, report: Reporter = silent) -> bool:
    """Whether the graph can be written for a model, and run here."""
    nodes = _nodes(layers)
    known = bool(nodes) and {layer.activation for layer in nodes} <= set(CPU_ACTIVATIONS)
    return precision == PRECISION and known and operator_or_reason(report)[0] is not None


def write_runtime(traced: Path, target: Path, forms: dict[str, Form]) -> None:
    """Write the graph from the traced one, in whose folder its weights lie."""
    graph = ir.load(traced)
    lower_clear_ffn(graph, forms)
    ir.save(graph, target)


def moee_graph(manifest: Mapping[str, Any], provider: str) -> str:
    """The file of an export that runs the model with experts here: `runtime.onnx` where there is one and the operator's library
    can be had, else `portable.onnx`. A library that lacks is said."""
    if provider != PROVIDER or KEY not in manifest.get("graphs", {}):
        return PORTABLE
    library, reason = operator_or_reason()
    if library is None:
        log.warning("%s is not used, the graph of standard operators is: %s", RUNTIME, reason)
        return PORTABLE
    return RUNTIME
