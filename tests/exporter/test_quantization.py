"""Quantisation to int8: arithmetic, calibration, and the rule that leaves layers out."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from exporter.quantization import QuantConv2d, QuantLinear, calibrate, quantizable, quantized
from exporter.quantization.calibrate import Histogram, sqnr_db
from exporter.quantization.ops import dequantize, quantize_dequantize
from moee.errors import UserError
from moee.layers.routed import routed_layers
from tests.conftest import tiny_images

# of the tests' tiny ViT
DENSE = ["patch_embed.proj", *(f"blocks.{i}.attn.{part}" for i in range(3) for part in ("qkv", "proj")), "head"]


# arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_steps_are_those_of_onnx_runtime(dtype):
    """Ties go to the even step, values beyond the range are clipped, zero stays zero."""
    scale = torch.tensor(0.25, dtype=dtype)
    x = torch.cat([torch.arange(-40, 40) * 0.125, torch.tensor([1e4, -1e4, 31.8, -32.2, 0.0]), torch.randn(500) * 20]).to(dtype)
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.numpy().dtype)
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, kind, [None]) for n in "xy"]
    stored = [numpy_helper.from_array(scale.numpy(), "s"), numpy_helper.from_array(np.array(0, np.int8), "z")]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x.numpy()})[0]
    assert np.array_equal(quantize_dequantize(x, scale).numpy(), expected)
    assert quantize_dequantize(torch.tensor([0.125, 0.375]).to(dtype), scale).tolist() == [0.0, 0.5]


def test_weights_are_those_of_onnx_runtimes_quantiser():
    from onnxruntime.quantization.quant_utils import quantize_data

    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 5)
    made = QuantLinear(linear, 0.1, torch.float32)
    for channel, row in enumerate(linear.weight.detach().numpy()):
        _, scale, q = quantize_data(row, onnx.TensorProto.INT8, symmetric=True)
        assert np.isclose(float(made.scale[channel]), float(np.ravel(scale)[0]), rtol=1e-6)
        assert np.abs(made.q[:, channel].numpy().astype(int) - np.asarray(q).astype(int)).max() <= 1
    error = (dequantize(made.q, made.scale, 1).T - linear.weight).abs()
    assert bool((error <= made.scale[:, None] / 2 + 1e-7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_dead_channel_and_a_dead_input_stay_finite(dtype):
    conv = torch.nn.Conv2d(3, 4, 2, stride=2)
    with torch.no_grad():
        conv.weight[1] = 0
        conv.weight[2] *= 1e-9
    made = QuantConv2d(conv, 0.0, dtype).to(dtype)
    assert bool((made.scale > 0).all()) and bool(made.input_scale > 0)
    y = made(torch.zeros(1, 3, 4, 4, dtype=dtype))
    assert torch.isfinite(y).all() and torch.allclose(y[0, :, 0, 0].float(), conv.bias.float(), atol=1e-2)


def test_closest_calls_move_one_value_an_image_by_one_step():
    layer = QuantLinear(torch.nn.Linear(6, 2), 1.0, torch.float32)
    x = torch.tensor([[[0.1, 2.4, 5.0, 7.45, -3.2, 0.0]], [[200.0, 1.0, -0.6, 3.0, 0.0, 127.49]]])
    layer.closest_calls = True
    moved, _ = layer.operands(x)
    layer.closest_calls = False
    plain, _ = layer.operands(x)
    assert (moved - plain).tolist() == [[[0, 0, 0, 1, 0, 0]], [[0, 0, 1, 0, 0, 0]]]


# calibration


def test_the_histogram_grows_without_losing_counts():
    histogram, random = Histogram(), np.random.default_rng(0)
    parts = [random.normal(0, s, 1000).astype(np.float32) for s in (0.1, 5.0, 0.3, 40.0)]
    for part in parts:
        histogram.add(torch.from_numpy(part))
    everything = np.abs(np.concatenate(parts))
    assert histogram.counts.sum() == 4000 and histogram.largest == everything.max() <= histogram.top
    expected, _ = np.histogram(everything, 16, (0, histogram.top))
    assert np.abs(histogram.counts.reshape(16, -1).sum(1) - expected).max() <= 2  # values on a border
    assert Histogram().step("mse") == 1.0


def test_mse_steps_clip_an_outlier_and_are_near_the_best():
    random = np.random.default_rng(0)
    values = np.append(random.normal(0, 1, 200_000), [60.0]).astype(np.float32)
    histogram = Histogram()
    histogram.add(torch.from_numpy(values))

    def error(step: float) -> float:
        return float(((values - np.clip(np.round(values / step), -128, 127) * step) ** 2).mean())

    largest, mse = histogram.step("largest"), histogram.step("mse")
    assert largest == pytest.approx(60 / 127) and mse < 0.8 * largest
    assert error(mse) <= 1.1 * min(error(s) for s in np.linspace(0.01, largest, 400))


class Fragile(torch.nn.Module):
    """Two layers; the second one's inputs span six orders of magnitude that all matter to the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.fragile = torch.nn.Linear(12, 12), torch.nn.Linear(12, 4, bias=False)
        self.unused, self.table = torch.nn.Linear(3, 3), torch.nn.Linear(2, 4)
        span = torch.logspace(-3, 3, 12)
        self.register_buffer("span", span)
        with torch.no_grad():
            self.fragile.weight.copy_(torch.randn(4, 12) / span)

    def forward(self, images):
        return self.fragile(self.fine(images[:, :1, :3, :4].flatten(1)) * self.span) + self.table(torch.zeros(6, 2)).mean()


def test_layers_that_lose_too_much_are_kept_and_named():
    data = tiny_images()
    model = Fragile().eval()
    result = calibrate(model, data, torch.float32, 32)
    assert set(result.input_scales) == {"fine"} and set(result.kept) == {"fragile", "unused", "table"}
    assert "dB" in result.kept["fragile"] and "never calls it" in result.kept["unused"]
    assert result.kept["table"] == "its input does not depend on the images"
    assert result.sqnr_db >= 20 and result.images == 32 and result.data == "tiny"
    everything = calibrate(model, data, torch.float32, 32, min_sqnr_db=-100)
    assert set(everything.input_scales) == {"fine", "fragile"} and everything.sqnr_db < 20
    nothing = calibrate(model, data, torch.float32, 32, min_sqnr_db=500)
    assert nothing.input_scales == {} and set(nothing.kept) == {"fine", "fragile", "unused", "table"}


def test_the_better_way_to_set_steps_is_taken(tiny_model):
    data = tiny_images()
    result = calibrate(tiny_model, data, torch.float32, 48)
    x = data.images[torch.randperm(48, generator=torch.Generator().manual_seed(0))[:32]]
    with torch.inference_mode():
        reached = sqnr_db(tiny_model(x), quantized(tiny_model, result.input_scales, torch.float32)(x))
    assert result.method in ("largest", "mse") and reached == pytest.approx(result.sqnr_db, abs=0.01) and reached > 20


def test_routed_layers_are_left_alone(tiny_moee):
    model = tiny_moee[0]
    assert list(quantizable(model)) == DENSE
    made = quantized(model, dict.fromkeys(DENSE, 0.1), torch.float16)
    for name, layer in routed_layers(made).items():
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), routed_layers(model)[name].buffers(), strict=True))
    assert sum(isinstance(m, (QuantLinear, QuantConv2d)) for m in made.modules()) == len(DENSE)
    with pytest.raises(UserError, match="quantises 'blocks.0.mlp', which is no dense layer"):
        quantized(model, {"blocks.0.mlp": 0.1}, torch.float16)
