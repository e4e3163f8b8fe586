"""The operator alone in an ONNX Runtime session: one MoeeFfn node whose weights are initialisers."""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from plugins.contract import ACTIVATIONS, DOMAIN, INPUT_NAMES, OP_TYPE
from plugins.cpu.build import LIBRARY, build_operator, source_sha256

ROOT = Path(__file__).resolve().parents[2] / "build" / "test-plugin"


@cache
def library(sanitize: bool = False, widest: int = 16) -> Path:
    """The library, compiled once for its sources."""
    folder = ROOT / f"operator-{source_sha256()[:16]}-{widest}{'-sanitized' if sanitize else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes
        if (folder / LIBRARY).is_file():
            return folder / LIBRARY
        return build_operator(folder, sanitize=sanitize, widest=widest)


def model(given: Mapping[str, torch.Tensor], *, variable: tuple[str, ...] = (), **attributes: Any) -> bytes:
    """A graph of one node; the inputs named in `variable` are the graph's, the others initialisers."""
    widths = given["offsets"].diff()
    attributes = {"activation": ACTIVATIONS[0], "top_k": 1, "max_width": int(widths.max()), **attributes}
    node = helper.make_node(OP_TYPE, list(INPUT_NAMES), ["y"], name="ffn", domain=DOMAIN, **attributes)
    kinds = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}
    inputs = [
        helper.make_tensor_value_info(n, kinds[given[n].dtype], [None] * given[n].dim()) for n in INPUT_NAMES
        if n == "x" or n in variable
    ]  # fmt: skip
    stored = [numpy_helper.from_array(given[n].numpy(), n) for n in INPUT_NAMES if n != "x" and n not in variable]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", inputs, [result], stored)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(graph: bytes, threads: int = 2, operator: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(operator or library()))
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def run(given: Mapping[str, torch.Tensor], threads: int = 2, widest: int = 16, **attributes: Any) -> torch.Tensor:
    """The operator's y [T, D] float32."""
    y: np.ndarray = session(model(given, **attributes), threads, library(widest=widest)).run(None, {"x": given["x"].numpy()})[0]
    return torch.from_numpy(y)
