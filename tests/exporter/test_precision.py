"""Typed models and graphs: which types stand where, what stays in float32, what the widened copy computes."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from exporter.graph.export import export
from exporter.graph.trace import to_onnx
from exporter.passes.widen import widen_bfloat16
from exporter.precision import RoundedModel, TypedModel, dtype_of, typed
from moee.errors import UserError
from moee.layers.routed import routed_layers
from plugins.contract import INPUTS, OP_TYPE

TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
EPS = {"fp16": 2**-10, "bf16": 2**-7}


@pytest.mark.parametrize("precision", TYPES)
def test_typed_model_is_close_and_keeps_norms_and_router_bias(tiny_export, precision):
    dtype = dtype_of(precision)
    model = tiny_export.moee.model
    half = typed(model, dtype)
    assert isinstance(half, TypedModel) and typed(model, torch.float32) is model
    for kind in (torch.nn.LayerNorm, torch.nn.Linear):
        assert any(isinstance(module, kind) for module in half.model.modules()), kind
    assert routed_layers(half.model)
    for module in half.model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.weight.dtype == torch.float32
        if isinstance(module, torch.nn.Linear):
            assert module.weight.dtype == dtype
    for layer in routed_layers(half.model).values():
        assert layer.router_bias.dtype == torch.float32 and layer.router.dtype == layer.w_up.dtype == dtype
    assert next(model.parameters()).dtype == torch.float32  # the original is untouched
    x = tiny_export.data.images[:4]
    with torch.inference_mode():
        exact = RoundedModel(model, dtype, torch.float64).eval()(x)
        y = half.eval()(x)
    assert y.dtype == torch.float32 and exact.dtype == torch.float64
    assert 0 < float((y - exact).abs().max()) < 8 * EPS[precision] * float(exact.square().mean().sqrt())


def test_softmax_runs_in_float32(tiny_export):
    """Scores that overflow float16's exponential, and a mask; against float64."""
    from exporter.precision import _Float32Parts

    q, k, v = (torch.randn(1, 2, 5, 16, dtype=torch.float16) * s for s in (8, 8, 1))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with _Float32Parts():
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        masked = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        soft = (q[0, 0] * 60).softmax(-1)
        with pytest.raises(UserError, match="only plain attention"):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    reference = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(plain.double(), reference, atol=2e-2, rtol=1e-2)
    reference = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    torch.testing.assert_close(masked.double(), reference, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(soft.double(), (q[0, 0] * 60).double().softmax(-1), atol=1e-3, rtol=1e-3)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False)
    values = {v.name: v.type.tensor_type.elem_type for v in [*inferred.graph.value_info, *inferred.graph.input]}
    return values | {t.name: t.data_type for t in inferred.graph.initializer}


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_typed_graphs(tiny_export, precision):
    folder, half = tiny_export.folder(precision), TYPES[precision]
    for name in ("dense", "portable", "tensorrt"):
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=name != "tensorrt")
        model = onnx.load(folder / f"{name}.onnx")
        assert [v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]] == [onnx.TensorProto.FLOAT] * 2
        types = types_of(model)
        found = {node.op_type for node in model.graph.node}
        assert {"LayerNormalization", "Softmax", "Conv", "MatMul"} <= found and (OP_TYPE in found) == (name == "tensorrt")
        for node in model.graph.node:
            if node.op_type in ("LayerNormalization", "Softmax"):
                assert types[node.input[0]] == onnx.TensorProto.FLOAT, node.name
            if node.op_type == "Conv" or (node.op_type == "MatMul" and node.input[1] in types):
                assert types[node.input[1]] == half, node.name
            if node.op_type == OP_TYPE:
                for given, value in list(zip(INPUTS, node.input, strict=True))[1:]:
                    wanted = {"T": half, "float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32}[given.dtype]
                    assert types[value] == wanted, given.name
    stored = (folder / "moee.data").stat().st_size
    assert stored < 0.6 * (tiny_export.folder() / "moee.data").stat().st_size


def test_unknown_precision_is_refused(tiny_export, tmp_path):
    with pytest.raises(UserError, match="unknown precision 'int4'; expected one of fp32, fp16, bf16"):
        export(tiny_export.moee, tmp_path / "x", precision="int4")
    assert not (tmp_path / "x").exists()


def test_widening_keeps_values_and_makes_the_graph_run():
    """y = cast(x) @ w in bfloat16, which ONNX Runtime cannot run on the CPU, becomes the float32 product with rounded w."""
    w = np.random.default_rng(0).standard_normal((4, 3), np.float32)
    bits = (w.view(np.uint32) >> 16).astype(np.uint16)
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, w.shape, bits.tobytes(), raw=True)
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["a"], to=onnx.TensorProto.BFLOAT16),
        onnx.helper.make_node("MatMul", ["a", "w"], ["b"]),
        onnx.helper.make_node("Cast", ["b"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", [2, 4]), ("y", [2, 3]))]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    model = ir.from_proto(proto)
    assert widen_bfloat16(model) == 2
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, 4), np.float32)
    rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ rounded, rtol=1e-6)


class Numbers(torch.nn.Module):
    """Attention with heads 32 wide, whose scale bfloat16 cannot hold, and arithmetic with such numbers, from both sides."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(2)  # [B, 3, 32]
        y = torch.nn.functional.scaled_dot_product_attention(x, 3.3 * x, x)
        return torch.div(1.1 - torch.add(y * 0.17, 0.3), 0.7)


@pytest.mark.parametrize("width", [32, 64])
def test_numbers_are_not_rounded_in_a_widened_graph(width):
    """Against float64: rounded to bfloat16 they are off by up to 4e-3. A scale that is exact has no cast."""
    graph = to_onnx(TypedModel(Numbers(), torch.bfloat16), (3, 4, width // 4))
    scales = [v for v in graph.graph.initializers.values() if v.dtype == ir.DataType.BFLOAT16]
    assert all(float(v.const_value.numpy().astype(np.float32)) == width**-0.5 for v in scales) and len(scales) == (width == 64)
    widen_bfloat16(graph)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 3, 4, width // 4, generator=torch.Generator().manual_seed(0))
    exact = Numbers()(x.double())
    np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], exact.numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_with_numbers_rounds_the_result_alone(dtype):
    """Against float64: off by half a unit in the last place at most, as if the number itself had not been rounded."""
    from exporter.precision import _Float32Parts

    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)

    def results(x: torch.Tensor) -> list[torch.Tensor]:
        return [x * 0.17, 0.17 * x, x / 0.7, x + 0.3, 0.3 - x, torch.mul(x, other=0.17), x.sub(0.3)]

    with _Float32Parts():
        rounded = results(x)
    for value, exact in zip(rounded, results(x.double()), strict=True):
        assert value.dtype == dtype
        assert ((value.double() - exact).abs() <= 0.5001 * torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("precision", TYPES)
def test_tokens_of_zeros_have_a_direction_of_zeros(precision, tmp_path):
    """Padding of windows under cosine attention (Swin v2): 1e-12 is 0 in float16."""

    class Cosine(torch.nn.Module):
        def forward(self, x):
            unit = torch.nn.functional.normalize(input=torch.nn.functional.pad(x, (0, 0, 0, 3)), dim=-1)
            return unit @ unit.mT

    x = torch.randn(3, 4, 8)
    half = typed(Cosine(), dtype_of(precision))
    expected = Cosine()(x)
    assert torch.allclose(half(x), expected, atol=4 * EPS[precision]) and not expected[:, 4:].any()
    graph = to_onnx(half, x[:2])
    widen_bfloat16(graph)
    ir.save(graph, tmp_path / "cosine.onnx")
    given = ort.InferenceSession(tmp_path / "cosine.onnx").run(None, {"input": x.numpy()})[0]
    assert np.allclose(given, expected, atol=4 * EPS[precision])
