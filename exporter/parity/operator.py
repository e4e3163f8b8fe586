"""Check `runtime.onnx`, whose experts are the operator for ONNX Runtime (plugins/cpu), against the torch model.

Its routes are read by a second `MoeeFfn` node beside each one: the same router on the same tokens, with no neurons and an output
bias that tells the expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.forms.form import WeightProblem
from exporter.graph.runtime_graph import KEY, PROVIDER, RUNTIME
from exporter.onnx_safety import load_ir
from exporter.parity.outputs import BatchError
from exporter.parity.taps import copied, standard_taps
from exporter.passes.tape import Tape
from exporter.runners.operator_cache import operator_or_reason
from plugins.contract import DOMAIN, INPUT_NAMES, OP_TYPE


@dataclass(frozen=True)
class OperatorParity:
    """Errors of the graph by batch size, and layers whose stored weights are not the model's. `skipped`: why it was not run."""

    runtime: str = ""
    batches: tuple[BatchError, ...] = ()
    weight_problems: tuple[WeightProblem, ...] = ()
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Not run is not passed by itself: the portable graph is then what runs, and its checks decide."""
        if self.skipped:
            return True
        return bool(self.batches) and all(b.passed for b in self.batches) and not self.weight_problems


def why_not_run(manifest: Mapping[str, Any], provider: str) -> str | None:
    """None for an export without the graph; empty if it can be run here; else why not."""
    if KEY not in manifest.get("graphs", {}):
        return None
    if provider != PROVIDER:
        return f"{RUNTIME} runs on the CPU alone"
    return operator_or_reason()[1]


@contextmanager
def tapped_operator(folder: Path, layers: list[str]) -> Iterator[Path]:
    """A temporary copy of the graph that also outputs tokens, routes and result of every layer, as `taps.tapped_graph` does."""
    model = load_ir(folder / RUNTIME)
    nodes = {n.name: n for n in model.graph if n.domain == DOMAIN and n.op_type == OP_TYPE}
    for layer in layers:
        node = nodes.get(layer)
        model.graph.outputs.extend(standard_taps(model, folder / RUNTIME, layer) if node is None else _told(model, node, layer))
    with copied(model, folder / RUNTIME) as path:
        yield path


def _told(model: ir.Model, node: ir.Node, layer: str) -> list[ir.Value]:
    """Tokens [T, D], routes [T, k] and result [T, D] of a node."""
    inputs = dict(zip(INPUT_NAMES, node.inputs, strict=True))
    router, y = inputs["router"], node.outputs[0]
    assert router is not None and router.shape is not None, "an initialiser"
    experts, dim = (int(size) for size in router.shape)  # type: ignore[arg-type]
    top_k = node.attributes["top_k"].as_int()
    after = list(model.graph)[list(model.graph).index(node) + 1]
    tape = Tape(model.graph, after, f"{layer}/told")
    blank = {
        "b_out": tape.constant(np.eye(experts, dim, dtype=np.float32), "experts"),
        "neurons": tape.constant(np.zeros(0, np.int32), "no_neurons"),
        "offsets": tape.constant(np.zeros(experts + 1, np.int32), "no_offsets"),
    }
    attributes = [ir.AttrInt64("max_width", 0), *(a for name, a in node.attributes.items() if name != "max_width")]
    given = [blank.get(name, value) for name, value in inputs.items()]
    teller = ir.Node(DOMAIN, OP_TYPE, given, attributes, name=f"{layer}/told")
    teller.outputs[0].name = f"{layer}/told"
    tape.place(teller)
    shape = tape.constant(np.array([-1, dim], np.int64), "token_shape")
    rows = [tape.op("Reshape", [value, shape])[0] for value in (inputs["x"], teller.outputs[0], y)]
    route = tape.op("TopK", [rows[1], tape.constant(np.array([top_k], np.int64), "k")], outputs=2, axis=1, largest=1, sorted=1)[1]
    for value, kind in ((rows[0], ir.DataType.FLOAT), (route, ir.DataType.INT64), (rows[2], ir.DataType.FLOAT)):
        value.type = ir.TensorType(kind)
    return [rows[0], route, rows[2]]
