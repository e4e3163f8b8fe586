"""ONNX graphs by hand: a ViT whose FFNs are MoeeFfn nodes or plain MLPs, straight from the operator contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moee.store.artifact import sha256_file
from plugins.contract import DOMAIN, LOAD_UNIT, OP_TYPE, PLUGIN_NAMESPACE, PLUGIN_VERSION

ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


class Graph:
    """Collects nodes and initialisers; values are numpy float32 and stored in the graph's type."""

    def __init__(self, dtype: str = "float32", seed: int = 0):
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def weight(self, name: str, value: np.ndarray, dtype: str | None = None) -> str:
        dtype = dtype or self.dtype
        if value.dtype.kind == "i":
            tensor = numpy_helper.from_array(value, name)
        elif dtype == "bfloat16":
            bits = (np.ascontiguousarray(value, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            tensor = helper.make_tensor(name, TensorProto.BFLOAT16, value.shape, bits.tobytes(), raw=True)
        else:
            tensor = numpy_helper.from_array(value.astype(dtype), name)
        self.weights.append(tensor)
        return name

    def normal(self, name: str, *shape: int, dtype: str | None = None) -> str:
        return self.weight(name, self.random.standard_normal(shape, np.float32) * 0.02, dtype)

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def cast(self, value: str, output: str, dtype: str) -> str:
        return self.node("Cast", [value], output, to=ONNX_TYPES[dtype])

    def moee(
        self, name: str, x: str, dim: int, experts: int, union: int, width: int, top_k: int = 1, **extra: Any
    ) -> str:
        """One MoeeFfn node with random experts of `width` neurons each."""
        picks = [np.sort(self.random.choice(union, width, replace=False)).astype(np.int32) for _ in range(experts)]
        inputs = [
            x,
            self.normal(f"{name}.router", experts, dim),
            self.normal(f"{name}.router_bias", experts, dtype="float32"),
            self.normal(f"{name}.w_up", union, dim),
            self.normal(f"{name}.b_up", union),
            self.normal(f"{name}.w_down", union, dim),
            self.normal(f"{name}.b_out", experts, dim),
            self.weight(f"{name}.neurons", np.concatenate(picks)),
            self.weight(f"{name}.offsets", (np.arange(experts + 1) * width).astype(np.int32)),
        ]
        attributes: dict[str, Any] = {
            **{"activation": "gelu", "top_k": top_k, "max_width": width, "load": [LOAD_UNIT // experts] * experts},
            **{"plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE},
            **extra,
        }
        return self.node(OP_TYPE, inputs, f"{name}.y", domain=DOMAIN, **attributes)

    def mlp(self, name: str, x: str, dim: int, hidden: int) -> str:
        h = self.node("MatMul", [x, self.normal(f"{name}.fc1", dim, hidden)], f"{name}.h")
        h = self.node("Add", [h, self.normal(f"{name}.fc1b", hidden)], f"{name}.hb")
        h = self.node("Gelu", [h], f"{name}.gelu")
        h = self.node("MatMul", [h, self.normal(f"{name}.fc2", hidden, dim)], f"{name}.o")
        return self.node("Add", [h, self.normal(f"{name}.fc2b", dim)], f"{name}.y")

    def norm(self, name: str, x: str, dim: int) -> str:
        """LayerNorm in float32, whatever the graph's type."""
        up = self.cast(x, f"{name}.f32", "float32") if self.dtype != "float32" else x
        inputs = [up, self.weight(f"{name}.g", np.ones(dim, np.float32), "float32")]
        inputs.append(self.weight(f"{name}.b", np.zeros(dim, np.float32), "float32"))
        y = self.node("LayerNormalization", inputs, f"{name}.n", axis=-1, epsilon=1e-6)
        return self.cast(y, f"{name}.cast", self.dtype) if self.dtype != "float32" else y

    def attention(self, name: str, x: str, dim: int, heads: int, tokens: int) -> str:
        shape = self.weight(f"{name}.split", np.array([0, tokens, heads, dim // heads], np.int64))
        parts = []
        for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            h = self.node("MatMul", [x, self.normal(f"{name}.w{part}", dim, dim)], f"{name}.{part}0")
            h = self.node("Reshape", [h, shape], f"{name}.{part}1")
            parts.append(self.node("Transpose", [h], f"{name}.{part}", perm=perm))
        s = self.node("MatMul", parts[:2], f"{name}.s")
        s = self.cast(s, f"{name}.s32", "float32") if self.dtype != "float32" else s
        s = self.node("Softmax", [s], f"{name}.p", axis=-1)
        s = self.cast(s, f"{name}.pc", self.dtype) if self.dtype != "float32" else s
        o = self.node("MatMul", [s, parts[2]], f"{name}.pv")
        o = self.node("Transpose", [o], f"{name}.ot", perm=[0, 2, 1, 3])
        o = self.node("Reshape", [o, self.weight(f"{name}.join", np.array([0, tokens, dim], np.int64))], f"{name}.or")
        return self.node("MatMul", [o, self.normal(f"{name}.wo", dim, dim)], f"{name}.out")

    def model(self, size: int, output: str, channels: int) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, size, size])
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", channels])
        graph = helper.make_graph(self.nodes, "vit", [x], [y], self.weights)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def vit(
    *, depth: int, dim: int, heads: int, size: int, patch: int, experts: int = 0, union: int = 0, width: int = 0,
    dtype: str = "float32", top_k: int = 1,
) -> onnx.ModelProto:  # fmt: skip
    """A ViT over `input` [batch, 3, size, size] in `dtype`; dense with `experts` 0, else one MoeeFfn a block."""
    g = Graph(dtype)
    tokens = (size // patch) ** 2
    x = g.cast("input", "input.cast", dtype) if dtype != "float32" else "input"
    kernel = g.normal("patch", dim, 3, patch, patch)
    x = g.node("Conv", [x, kernel], "conv", strides=[patch, patch], kernel_shape=[patch, patch])
    x = g.node("Reshape", [x, g.weight("flat", np.array([0, dim, tokens], np.int64))], "tokens0")
    x = g.node("Transpose", [x], "tokens", perm=[0, 2, 1])
    for i in range(depth):
        a = g.attention(f"b{i}.attn", g.norm(f"b{i}.n1", x, dim), dim, heads, tokens)
        x = g.node("Add", [x, a], f"b{i}.x1")
        n = g.norm(f"b{i}.n2", x, dim)
        name = f"b{i}.mlp"
        f = g.moee(name, n, dim, experts, union, width, top_k) if experts else g.mlp(name, n, dim, 4 * dim)
        x = g.node("Add", [x, f], f"b{i}.x2")
    x = g.node("ReduceMean", [x, g.weight("axes", np.array([1], np.int64))], "pooled", keepdims=0)
    x = g.cast(x, "logits", "float32") if dtype != "float32" else g.node("Identity", [x], "logits")
    return g.model(size, "logits", dim)


def write_export(folder: Path, **options: Any) -> Path:
    """An export folder (moee.export/1) with dense.onnx and tensorrt.onnx from `vit`."""
    folder.mkdir(parents=True, exist_ok=True)
    experts = {key: options.pop(key) for key in ("experts", "union", "width", "top_k") if key in options}
    onnx.save(vit(**options), folder / "dense.onnx")
    onnx.save(vit(**options, **experts), folder / "tensorrt.onnx")
    return write_export_manifest(folder, options["size"])


def write_export_manifest(folder: Path, size: int) -> Path:
    """`export.json` for the graphs that lie in `folder`."""
    manifest = {
        **{"schema": "moee.export/1", "files": {path.name: sha256_file(path) for path in folder.glob("*.onnx")}},
        "graphs": {"dense": "dense.onnx", "tensorrt": "tensorrt.onnx"},
        "input": {"name": "input", "size": size, "mean": [0.5] * 3, "std": [0.5] * 3},
        **{"model": {"name": "made up", "timm_name": "made_up", "random_seed": 0}, "data": "none", "routed_layers": ["b0.mlp"]},
    }
    (folder / "export.json").write_text(json.dumps(manifest))
    return folder
