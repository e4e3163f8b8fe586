"""CLEAR-MoE through save, load, export, ONNX Runtime and parity; and both lowered forms against torch."""

import copy
import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from exporter.forms.clear import ClearForm
from exporter.graph.export import export
from exporter.graph.trace import to_onnx
from exporter.parity import check_parity
from exporter.passes.clear import OP_TYPE, lower_clear_ffn
from exporter.passes.name_routes import name_routed_nodes
from exporter.precision import typed
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.layers.clear import ClearFFN, ClearParts
from moee.layers.clear_dispatch import Factors
from moee.layers.clear_routers import Router
from moee.methods.clear_moe.convert import convert
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.recipe import Recipe
from moee.models.model import load_model
from tests.conftest import tiny_images, tiny_spec
from tests.exporter import one_layer


def random_layer(experts=3, ranks=(6, 2, 5, 3), dim=16, hidden=24, width=0, activation="gelu", seed=0) -> ClearFFN:
    """A layer with random weights; `width` hidden units in the router."""
    g = torch.Generator().manual_seed(seed)

    def factors(rank, residual, inputs, outputs):
        rows = rank + experts * residual
        return Factors(
            torch.randn(rows, inputs, generator=g) / inputs**0.5, torch.randn(rows, outputs, generator=g) / rows**0.5,
            torch.randn(experts, outputs, generator=g), rank, residual,
        )  # fmt: skip

    router = Router(
        torch.randn(experts, width or dim, generator=g), torch.randn(experts, generator=g) / 4,
        torch.randn(width, dim, generator=g), torch.randn(width, generator=g),
    )  # fmt: skip
    up, down = factors(*ranks[:2], dim, hidden), factors(*ranks[2:], hidden, dim)
    return ClearFFN(ClearParts(router, up, down, activation)).eval()


CASES = {
    "linear router": dict(),
    "two-layer router": dict(width=7),
    "one expert": dict(experts=1),
    "no residual": dict(ranks=(6, 0, 5, 0)),
    "residual in one map": dict(ranks=(6, 0, 5, 3)),
    "silu": dict(activation="silu"),
    "relu": dict(activation="relu"),
    "quick gelu": dict(activation="quick_gelu"),
    "idle expert": dict(experts=8),
}


def sessions_of(layer, dim=16, forms=("masked", "sorted")):
    """One traced graph, lowered to each form, as ONNX Runtime sessions that also give the routes."""
    graph = one_layer.traced(layer, dim)
    proto = ir.to_proto(graph)
    for form in forms:
        lowered = ir.from_proto(proto)
        assert lower_clear_ffn(lowered, form) == 1
        one_layer.show_routes(lowered)
        yield ort.InferenceSession(ir.to_proto(lowered).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("case", CASES)
def test_lowered_layer_matches_torch(case):
    layer = random_layer(**CASES[case])
    for session, batch in itertools.product(sessions_of(layer), (1, 3)):
        x = torch.randn(batch, 3, 4, 4)
        got, routes = session.run(None, {"input": x.numpy()})
        tokens = x.reshape(batch, 3, 16)
        np.testing.assert_allclose(got, layer(tokens).detach().numpy(), rtol=1e-4, atol=1e-5)
        assert (routes == layer.routes(tokens)[:, 0].numpy()).all()


@pytest.mark.parametrize("side", ["up", "down"])
def test_another_experts_overflow_in_half_precision_is_zero(side):
    """In the masked form every token meets every expert's coefficients."""
    layer = random_layer(experts=2)
    rank, residual = layer.ranks[:2] if side == "up" else layer.ranks[2:]
    with torch.no_grad():
        layer.router.zero_()
        layer.router_bias.copy_(torch.tensor([1.0, 0.0]))  # all tokens go to expert 0
        layer.up_bias.add_(5)  # positive hidden values
        getattr(layer, f"{side}_in")[rank + residual :] = 3e4
    graph = to_onnx(typed(one_layer.OneLayer(layer, 16), torch.float16), (3, 4, 4))
    name_routed_nodes(graph, ["layer"])
    assert lower_clear_ffn(graph, "masked") == 1
    x = torch.randn(1, 3, 4, 4).abs() + 1
    with np.errstate(over="ignore"):  # ONNX Runtime's CPU provider works in float32 throughout and would not overflow
        (got,) = ReferenceEvaluator(ir.to_proto(graph)).run(None, {"input": x.numpy()})
    assert np.isfinite(got).all()
    tokens = x.reshape(1, 3, 16)
    np.testing.assert_allclose(got, layer(tokens).detach().numpy(), rtol=0.02, atol=0.05)
    half = copy.deepcopy(layer).half()
    half.backend = "masked"
    assert half(tokens.half()).isfinite().all()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A converted model, the same saved and loaded, its images, its folder. Tests that change the model take a copy."""
    torch.manual_seed(0)
    model, data, folder = load_model(tiny_spec()), tiny_images(), tmp_path_factory.mktemp("clear")
    config = ClearOptions(rank=8, residual_rank=2, experts=3, calibration_images=40)
    convert(model, data, config)
    moee = MoeeModel(model.eval(), tiny_spec(), Recipe.of(config), "tiny")
    checkpoint.save(moee, folder / "model")
    loaded = checkpoint.load(folder / "model")
    export(loaded, folder / "export")
    return moee, loaded, data, folder


def test_saved_model_comes_back_bit_for_bit(exported):
    moee, loaded, data, _ = exported
    assert loaded.recipe == moee.recipe
    for name, tensor in moee.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(moee.model(data.images), loaded.model(data.images))


def test_parity_and_graphs_of_standard_operators(exported):
    _, loaded, data, folder = exported
    result = check_parity(folder / "export", loaded, data)
    assert result.passed and min(result.route_agreement.values()) == 1.0 and result.max_abs_error < 1e-5
    assert not (folder / "export" / "traced.onnx").exists()
    for name in ("portable", "tensorrt"):
        path = folder / "export" / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        nodes = onnx.load(path, load_external_data=False).graph.node
        assert not [n for n in nodes if n.domain or n.op_type == OP_TYPE]
    loops = [n for n in onnx.load(folder / "export" / "tensorrt.onnx").graph.node if n.op_type in ("Split", "TopK")]
    assert not loops, "the TensorRT form has no dispatch"


def test_parity_notices_a_changed_expert(exported):
    _, loaded, data, folder = exported
    damaged = copy.deepcopy(loaded)
    with torch.no_grad():
        damaged.model.blocks[1].mlp.up_out[-1] *= 3
    assert not check_parity(folder / "export", damaged, data)


def test_the_tensorrt_form_computes_the_same(exported):
    _, loaded, data, folder = exported
    session = ort.InferenceSession(str(folder / "export" / "tensorrt.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"input": data.images[:5].numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, loaded.model(data.images[:5]).numpy(), rtol=1e-4, atol=1e-5)


def test_portable_form_follows_the_segments():
    layer = random_layer(experts=4)
    assert ClearForm().portable(layer, 65) == "sorted" and ClearForm().portable(layer, 60) == "masked"
    assert ClearForm().portable(random_layer(ranks=(6, 0, 5, 0)), 10_000) == "masked"
    with pytest.raises(ValueError, match="unknown form 'x'"):
        next(sessions_of(layer, forms=("x",)))


def test_engine_without_a_plugin(exported):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx to build engines on the CPU")
    from exporter.engines.build import build_engines, needs_plugin

    folder = exported[3]
    assert not needs_plugin(folder / "export")
    report = build_engines(folder / "export", folder / "engine", plugin=None, batch=(1, 2, 4))
    assert report.plugin_layers == 0 and report.moee.size_bytes > 0 and report.plugin == ""


def test_distillation_trains_everything_but_the_router(exported):
    from moee.config import FinetuneConfig
    from moee.train.finetuning import finetune

    loaded, data = copy.deepcopy(exported[1]), exported[2]
    torch.manual_seed(0)
    dense = load_model(tiny_spec())
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    result = finetune(loaded.model, dense, data, FinetuneConfig(epochs=1, lr=1e-4, batch_size=16))
    assert result.validation_loss[1] < result.validation_loss[0]
    changed = {n for n, p in loaded.model.named_parameters() if not torch.equal(p, before[n])}
    assert {f"blocks.0.mlp.{p}" for p in ("up_in", "up_out", "up_bias", "down_in", "down_out", "down_bias")} <= changed
    assert not [n for n in changed if n.endswith("mlp.router")]
