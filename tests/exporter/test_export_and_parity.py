"""The exported graphs: structure, numbers, routes; and that parity notices planted damage."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from exporter.graph.export import MANIFEST, SCHEMA, export
from exporter.graph.trace import to_onnx
from exporter.parity import check_parity
from exporter.passes.name_routes import name_routed_nodes
from exporter.passes.portable import MIN_ROWS, lower_routed_ffn
from exporter.precision import typed
from exporter.timing.latency import bench
from moee.artifacts.model import MoeeModel
from moee.errors import UserError
from moee.layers.activations import ACTIVATIONS
from moee.layers.routed import RoutedFFN, routed_layers
from moee.models.model import replace_module
from moee.store.artifact import read_manifest
from plugins import contract
from tests.conftest import tiny_spec
from tests.exporter import one_layer
from tests.moee.reference import random_problem
from tests.moee.test_ops import layer_of


@pytest.fixture
def exported(tiny_export):
    """A model of its own, which a test may damage, its images, and the shared export."""
    return copy.deepcopy(tiny_export.moee), tiny_export.data, tiny_export.folder()


def test_graphs_and_manifest(exported):
    moee, _, folder = exported
    manifest = read_manifest(folder, MANIFEST, SCHEMA)
    assert manifest["routed_layers"] == list(routed_layers(moee.model))
    names = {p.name for p in folder.iterdir()}
    assert names == {"dense.onnx", "dense.data", "portable.onnx", "tensorrt.onnx", "moee.data", "export.json", "MODEL_CARD.md"}
    for name in ("dense", "portable", "tensorrt"):
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=name != "tensorrt")
    portable = onnx.load(folder / "portable.onnx", load_external_data=False)
    assert {o.domain for o in portable.opset_import} == {""} and portable.opset_import[0].version >= 20
    assert not [n for n in portable.graph.node if n.op_type == contract.OP_TYPE]


def test_operator_node_follows_the_contract(exported):
    moee, _, folder = exported
    model = onnx.load(folder / "tensorrt.onnx")
    nodes = [n for n in model.graph.node if n.op_type == contract.OP_TYPE]
    assert [n.name for n in nodes] == list(routed_layers(moee.model))
    types = {i.name: i.data_type for i in model.graph.initializer}
    for node in nodes:
        layer = routed_layers(moee.model)[node.name]
        assert node.domain == contract.DOMAIN and len(node.input) == len(contract.INPUTS)
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert set(attributes) == {a.name for a in contract.ATTRIBUTES}
        assert attributes["activation"] == b"gelu" and attributes["top_k"] == 1
        assert attributes["max_width"] == max(layer.widths) and tuple(attributes["load"]) == layer.load
        assert attributes["plugin_version"] == b"1" and attributes["plugin_namespace"] == b""
        for given, name in zip(contract.INPUTS[1:], node.input[1:], strict=True):
            expected = onnx.TensorProto.INT32 if given.dtype == "int32" else onnx.TensorProto.FLOAT
            assert types[name] == expected, given.name


def test_portable_shares_the_weights_and_keeps_one_copy(exported):
    _, _, folder = exported
    stored = sum(p.nbytes for p in exported[0].model.parameters())
    assert (folder / "moee.data").stat().st_size < 1.1 * stored
    assert (folder / "portable.onnx").stat().st_size < 200_000


def test_dynamic_batch_and_parity(exported):
    moee, data, folder = exported
    result = check_parity(folder, moee, data)
    assert result and result.passed
    assert [b.batch for b in result.batches] == [1, 8, 32]
    assert min(result.route_agreement.values()) == 1.0 and result.top1_agreement == 1.0
    assert result.max_abs_error < 1e-5


def _noise(moee):
    moee.model.blocks[1].mlp.w_down.data *= 1.01


def _swapped_experts(moee):
    layer = moee.model.blocks[1].mlp
    layer.router.data[[0, 1]] = layer.router.data[[1, 0]]


@pytest.mark.parametrize("damage", [_noise, _swapped_experts])
def test_parity_fails_when_the_graph_and_the_model_differ(exported, damage):
    moee, data, folder = exported
    damage(moee)
    result = check_parity(folder, moee, data)
    assert not result
    if damage is _swapped_experts:
        worst = min(result.route_agreement, key=result.route_agreement.get)
        assert worst == "blocks.1.mlp" and result.route_agreement["blocks.0.mlp"] == 1.0


CASES = {
    "one expert": dict(tokens=9, dim=16, union=24, widths=[20]),
    "one token, idle experts": dict(tokens=1, dim=16, union=24, widths=[5, 20, 9]),
    "an expert without neurons": dict(tokens=30, dim=16, union=10, widths=[0, 10, 3]),
    "top 2": dict(tokens=11, dim=16, union=24, widths=[5, 20, 9], top_k=2),
    "relu": dict(tokens=11, dim=16, union=24, widths=[5, 20], activation="relu"),
    "silu": dict(tokens=11, dim=16, union=24, widths=[5, 20], activation="silu"),
    "more experts than are split one by one": dict(tokens=40, dim=16, union=24, widths=[5, 20, 9, 4, 8, 3, 7, 6, 2, 1]),
    "tanh gelu": dict(tokens=11, dim=16, union=24, widths=[5, 20], activation="gelu_tanh"),
    "quick gelu": dict(tokens=11, dim=16, union=24, widths=[5, 20], activation="quick_gelu"),
}


def lowered(layer: torch.nn.Module, dim: int, show_routes: bool = False):
    """A one-layer model through the exporter and the pass, as an ONNX Runtime session; routes as a second output if wanted."""
    graph = one_layer.traced(layer, dim)
    assert lower_routed_ffn(graph) == 1
    if show_routes:
        one_layer.show_routes(graph)
    return ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("case", CASES)
def test_lowered_operator_matches_torch(case):
    p = random_problem(**CASES[case])
    layer = layer_of(p).eval()
    session = lowered(layer, 16)
    for batch in (1, 3, 50):  # the last has enough tokens an expert for the grouped form
        x = torch.randn(batch, 3, 4, 4)
        (got,) = session.run(None, {"input": x.numpy()})
        np.testing.assert_allclose(got, layer(x.reshape(batch, 3, 16)).detach().numpy(), rtol=1e-4, atol=1e-5)


def forms(layer: torch.nn.Module, tokens: int) -> tuple[list[str], set[str]]:
    """Kinds of the nodes of one lowered layer on images of so many tokens, and of those in the branches of an If."""
    graph = to_onnx(layer, torch.zeros(2, tokens, 16))
    assert lower_routed_ffn(graph) == 1
    top = [n.op_type for n in graph.graph]
    return top, {n.op_type for n in graph.graph.all_nodes()} - set(top)


def test_the_form_follows_the_tokens_of_one_image():
    """Few tokens an expert at batch 1: the graph decides when it runs. Enough: grouped, without a branch."""
    layer = layer_of(random_problem(9, 16, 24, [5, 20, 9])).eval()
    top, inside = forms(layer, 3 * MIN_ROWS - 1)
    assert "If" in top and {"Split", "Concat", "MatMul"} <= inside
    top, inside = forms(layer, 3 * MIN_ROWS)
    assert "If" not in top and top.count("Gemm") == 7 and not inside  # the router's, and two an expert
    twice = layer_of(random_problem(9, 16, 24, [5, 20, 9], top_k=2)).eval()
    assert "If" not in forms(twice, 3)[0]  # the masked form is for one expert a token


@pytest.mark.parametrize("widths", [[5, 20, 9], [4, 20, 9], [24, 24], [8] * 9])
def test_neurons_that_all_experts_keep_are_computed_once_for_all_tokens(monkeypatch, widths):
    """One expert keeps nothing else, or all keep everything."""
    monkeypatch.setattr("exporter.passes.portable.CORE", 4)
    p = random_problem(tokens=9, dim=16, union=24, widths=widths)
    generator = torch.Generator().manual_seed(0)
    kept = [{*range(4), *(4 + torch.randperm(20, generator=generator)[: width - 4]).tolist()} for width in widths]
    p["neurons"] = torch.tensor([neuron for neurons in kept for neuron in sorted(neurons)], dtype=torch.int32)
    layer = layer_of(p).eval()
    for batch in (3, 100):  # below and above the form of few tokens
        x = torch.randn(batch, 3, 4, 4)
        (got,) = lowered(layer, 16).run(None, {"input": x.numpy()})
        np.testing.assert_allclose(got, layer(x.reshape(batch, 3, 16)).detach().numpy(), rtol=1e-4, atol=1e-5)
    top, _ = forms(layer, len(widths) * MIN_ROWS)
    empty = sum(neurons == set.intersection(*kept) for neurons in kept)
    assert top.count("Expand") == empty
    assert top.count("Gemm") == 1 + 2 + 2 * (len(widths) - empty), "the router, the core, experts that keep more"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dropped_neuron_that_overflows_in_half_precision_is_zero(activation):
    """In the masked form every token meets every neuron; those of the other expert may be infinite in float16."""
    p = random_problem(tokens=9, dim=16, union=24, widths=[12, 12], activation=activation)
    p["neurons"] = torch.arange(24, dtype=torch.int32)
    p["router"], p["router_bias"] = torch.zeros(2, 16), torch.tensor([1.0, 0.0])
    p["w_up"][12:] = 3e4 * torch.tensor([1.0, -1.0]).repeat(6)[:, None]  # expert 1's, and all tokens go to expert 0
    layer = layer_of(p).eval()
    graph = to_onnx(typed(one_layer.OneLayer(layer, 16), torch.float16), (3, 4, 4))
    name_routed_nodes(graph, ["layer"])
    assert lower_routed_ffn(graph) == 1
    x = torch.randn(1, 3, 4, 4).abs() + 1
    with np.errstate(over="ignore"):  # ONNX Runtime's CPU provider works in float32 throughout and would not overflow
        (got,) = ReferenceEvaluator(ir.to_proto(graph)).run(None, {"input": x.numpy()})
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, layer(x.reshape(1, 3, 16)).detach().numpy(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_without_finite_scores_go_to_the_lowest_experts(top_k):
    """The operator's rule, also where only one expert's score is not finite, and where finite values overflow."""
    p = random_problem(tokens=9, dim=16, union=24, widths=[5, 20, 9], top_k=top_k)
    p["router"][0] = 0.0  # never the best by itself, and finite times zero
    p["router_bias"][:] = torch.tensor([-100.0, 0.0, 0.0])
    layer = layer_of(p).eval()
    session = lowered(layer, 16, show_routes=True)
    x = torch.randn(9, 16)
    x[1, 3], x[3, 0], x[5] = float("nan"), float("-inf"), 3e38
    routes = session.run(None, {"input": x.reshape(3, 3, 4, 4).numpy()})[1].reshape(9, top_k)
    assert (routes[[1, 3, 5]] == list(range(top_k))).all()
    np.testing.assert_array_equal(np.sort(routes, 1), layer.routes(x).sort(1).values.numpy())
    assert not (routes[[0, 2, 4, 6, 7, 8], 0] == 0).any()


def test_lowering_refuses_tables_that_are_not_constants():
    import onnx_ir as ir

    values = [ir.Value(name=n) for n in contract.INPUT_NAMES]
    node = ir.Node(contract.DOMAIN, contract.OP_TYPE, values, num_outputs=1, name="layer")
    model = ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
    with pytest.raises(ValueError, match="`layer`: neurons must be an initialiser"):
        lower_routed_ffn(model)
    with pytest.raises(ValueError, match="expected 2 MoeeFfn nodes, found 1"):
        name_routed_nodes(model, ["a", "b"])


def test_channels_first_models_export(tmp_path):
    p = random_problem(24, 16, 32, [10, 20, 5])
    from moee.layers.routed import Experts

    layer = RoutedFFN(Experts(**{k: v for k, v in p.items() if k != "x"}), channels_first=True)

    class Conv(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Identity()
            replace_module(self, "mlp", layer)

        def forward(self, x):
            return self.mlp(x.repeat(1, 6, 1, 1)[:, :16])

    graph = to_onnx(Conv(), (3, 4, 4))
    name_routed_nodes(graph, ["mlp"])
    lower_routed_ffn(graph)
    import onnx_ir as ir

    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 3, 4, 4)
    expected = Conv()(x).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


def test_bench_reports_both_models(exported):
    result = bench(exported[2], batch=2, runs=5)
    assert result.batch == 2 and result.runs == 5
    for values in (result.dense_ms, result.moee_ms):
        assert 0 < values["p50"] <= values["p95"]
    assert result.speedup_p5 <= result.speedup <= result.speedup_p95


def test_a_model_without_routed_layers_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="the model has no routed layer and merges no tokens"):
        export(MoeeModel(tiny_model, tiny_spec(), None, "tiny"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_graph_that_cannot_be_read_back_is_one_sentence(tiny_export, tmp_path, monkeypatch):
    """What the libraries under the export say of it is about themselves."""

    def rename(graph: ir.Model) -> None:
        for node in list(graph.graph)[:2]:
            node.outputs[0].name = "product"

    monkeypatch.setattr("exporter.graph.trace.rewrite_attention", rename)
    with pytest.raises(UserError, match="^the model's graph cannot be written as ONNX .*'product' is redeclared.*report this"):
        export(copy.deepcopy(tiny_export.moee), tmp_path / "out")
    assert not (tmp_path / "out").exists()
