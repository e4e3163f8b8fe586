"""The rewrite of traced attention: what matches gives the same numbers with fewer copies, what does not is left alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import timm
import torch
from torch import nn

from exporter.graph.trace import to_onnx
from exporter.passes.attention import rewrite_attention
from exporter.passes.tape import Tape

MODELS = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3), 2, 2),
    "deit, distilled": (
        "deit_tiny_distilled_patch16_224", dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3), 2, 2,
    ),
    "swin": (  # its key has a plain Transpose already, which rule 3 merges
        "swin_tiny_patch4_window7_224", dict(img_size=64, embed_dim=24, depths=(1, 2), num_heads=(2, 4), window_size=4), 3, 0,
    ),
}  # fmt: skip


@pytest.fixture
def traced(monkeypatch):
    """Trace without the rewrite, which a test applies itself."""
    monkeypatch.setattr("exporter.graph.trace.rewrite_attention", lambda graph: (0, 0))

    def trace(model: nn.Module, size: int) -> ir.Model:
        return to_onnx(model.eval(), (3, size, size))

    return trace


def run(graph: ir.Model, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x})[0]


def kinds(graph: ir.Model) -> Counter:
    return Counter(n.op_type for n in graph.graph)


@pytest.mark.parametrize("name", MODELS)
def test_attention_of_timm_models(traced, name):
    timm_name, kwargs, blocks, keys = MODELS[name]
    torch.manual_seed(0)
    graph = traced(timm.create_model(timm_name, num_classes=5, **kwargs), kwargs["img_size"])
    x = np.random.default_rng(0).standard_normal((3, 3, kwargs["img_size"], kwargs["img_size"])).astype(np.float32)
    before, counts = run(graph, x), kinds(graph)
    assert rewrite_attention(graph) == (blocks, keys)
    after = kinds(graph)
    np.testing.assert_allclose(run(graph, x), before, rtol=1e-5, atol=1e-6)
    assert after["MatMul"] == counts["MatMul"] + 2 * blocks  # three products a block in the place of one
    assert after["Transpose"] == counts["Transpose"] + blocks  # q, k, v and the output; before: qkv, k and the output
    assert after["Slice"] <= counts["Slice"] - 3 * blocks and after["Squeeze"] == counts["Squeeze"] - 3 * blocks
    assert rewrite_attention(graph) == (0, 0)  # nothing is left to do


class Attention(nn.Module):
    """qkv in one product on [B, 16, 12], two heads; `leak` also returns what lies between; `order` names what the slices are."""

    def __init__(self, leak: bool = False, bias: bool = True, order: tuple[int, ...] = (0, 1, 2)):
        super().__init__()
        self.qkv, self.leak, self.order = nn.Linear(12, 36, bias=bias), leak, order

    def forward(self, x):
        x = x.reshape(x.shape[0], -1, 12)
        flat = self.qkv(x)
        parts = flat.reshape(x.shape[0], -1, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (parts[i] for i in self.order)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return y.transpose(1, 2).reshape(x.shape[0], -1) + (flat.sum((1, 2))[:, None] if self.leak else 0)


def test_an_intermediate_value_that_is_used_elsewhere_keeps_the_node(traced):
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    for leak, split in ((False, 1), (True, 0)):
        graph = traced(Attention(leak), 8)
        before = run(graph, x)
        assert rewrite_attention(graph)[0] == split
        np.testing.assert_allclose(run(graph, x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 0, 2)], ids=["another order", "one part twice"])
def test_parts_in_another_order_give_the_same_numbers(traced, order):
    """Which third of the weight a slice stands for is read from the graph."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    graph = traced(Attention(order=order), 8)
    before = run(graph, x)
    rewrite_attention(graph)
    np.testing.assert_allclose(run(graph, x), before, rtol=1e-5, atol=1e-6)


def key_graph(mixed: bool) -> ir.Model:
    """Shape -> Slices -> Concat -> Reshape -> Transpose -> Reshape, by hand."""
    from onnx import TensorProto, helper

    names = {"dim0": (0, 1), "dim1": (1, 2), "dim2": (2, 3), "dim3": (3, 4), "outer": (0, 2)}
    nodes = [helper.make_node("Identity", ["input"], ["k"]), helper.make_node("Shape", ["k"], ["s"])]
    ints = {"minus_one": [-1]}
    for name, (a, b) in names.items():
        ints |= {f"{name}_a": [a], f"{name}_b": [b]}
        nodes.append(helper.make_node("Slice", ["s", f"{name}_a", f"{name}_b"], [name]))
    flat = ["minus_one", "dim3", "dim2"] if mixed else ["minus_one", "dim2", "dim3"]
    nodes += [
        helper.make_node("Concat", flat, ["three"], axis=0),
        helper.make_node("Concat", ["outer", "dim2", "dim3"] if mixed else ["outer", "dim3", "dim2"], ["four"], axis=0),
        helper.make_node("Reshape", ["k", "three"], ["k3"]),
        helper.make_node("Transpose", ["k3"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["kt", "four"], ["y"]),
        helper.make_node("Identity", ["y"], ["output"]),
    ]
    floats = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 4) for n in ("input", "output")]
    constants = [helper.make_tensor(n, TensorProto.INT64, [1], v) for n, v in ints.items()]
    inner = [helper.make_tensor_value_info("k", TensorProto.FLOAT, [None] * 4)]
    graph = helper.make_graph(nodes, "g", floats[:1], floats[1:], constants, value_info=inner)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


@pytest.mark.parametrize(("mixed", "keys"), [(False, 1), (True, 0)])
def test_only_a_swap_of_the_last_two_dimensions_is_a_transposed_key(mixed, keys):
    """The same nodes with the dimensions in another order are another function."""
    graph, x = key_graph(mixed), np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    before = run(graph, x)
    assert rewrite_attention(graph) == (0, keys)
    np.testing.assert_array_equal(run(graph, x), before)


def test_without_a_bias_there_is_nothing_to_match(traced):
    graph = traced(Attention(bias=False), 8)
    assert rewrite_attention(graph)[0] == 0


def test_exports_are_rewritten():
    """`to_onnx` applies the pass."""
    names = [n.name or "" for n in to_onnx(Attention().eval(), (3, 8, 8)).graph]
    assert any(n.endswith("qkv.q/product") for n in names)


class TwoAttentions(nn.Module):
    """Two products for query, key and value in one module, which their nodes are named after."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(48, 16)) for _ in range(3)])
        self.biases = nn.ParameterList([nn.Parameter(torch.randn(48)) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            qkv = nn.functional.linear(tokens, weight, bias).reshape(x.shape[0], -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            tokens = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return tokens


class Probe(nn.Module):
    """A frozen network within a model that `switch` keeps from learning."""

    def __init__(self, switch) -> None:
        super().__init__()
        self.switch = switch
        self.body = nn.Sequential(TwoAttentions())
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.switch():
            tokens = self.body(x)
        return self.head(tokens.mean(1))


SWITCHES = {
    "no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}  # fmt: skip


def saved_and_run(graph: ir.Model, images: torch.Tensor, folder: Path) -> np.ndarray:
    """By way of a file, whose reader refuses names that occur twice."""
    ir.save(graph, folder / "graph.onnx")
    return run(ir.load(folder / "graph.onnx"), images.numpy())


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_part_without_gradients_keeps_its_names(tmp_path, switch):
    torch.manual_seed(0)
    model, images = Probe(SWITCHES[switch]).eval(), torch.randn(3, 16, 2, 3)
    graph = to_onnx(model, images)
    names = [node.name for node in graph.graph]
    assert len(set(names)) == len(names)
    products = {name for name in names if name.endswith("/product")}
    assert len(products) == 9
    if switch != "enable_grad":  # whose nodes torch gives no module
        assert products == {f"body.0{number}.{letter}/product" for number in ("", ".1", ".2") for letter in "qkv"}
    with torch.no_grad():
        expected = model(images).numpy()
    np.testing.assert_allclose(saved_and_run(graph, images, tmp_path), expected, rtol=1e-4, atol=1e-5)


def test_constants_of_one_name_and_other_values_are_told_apart():
    graph = ir.Graph([], [], nodes=[ir.Node("", "Identity", [None], name="last")], name="graph")
    tape = Tape(graph, graph[0], "layer")
    one, other = np.arange(3.0), np.arange(3.0) + 1
    first = tape.constant(one, "weight")
    assert tape.constant(one.copy(), "weight") is first
    second = tape.constant(other, "weight")
    assert second.name != first.name and np.array_equal(second.const_value.numpy(), other)
    assert tape.constant(other, "weight") is second
