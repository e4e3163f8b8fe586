"""`moee verify` on CLEAR-MoE layers and on models that mix both kinds: intact exports pass, planted damage is named."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporter import cli
from exporter.graph.export import export
from exporter.parity import check_parity
from exporter.parity.arithmetic import apply_layer, scores_and_bound
from exporter.parity.layers import wrong_routes
from exporter.precision import typed
from exporter.runners import EngineRunner, check_plugin
from exporter.verification import verify
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.data.image_set import TensorSet
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.models.model import replace_module
from moee.store.artifact import read_manifest, write_json
from tests.exporter import damage
from tests.exporter.conftest import rehash
from tests.exporter.engines import CpuDevice, FakeBinding, write_engine
from tests.exporter.test_clear_export import random_layer

ROUTED, SORTED, MASKED = "blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"
SIZES = (1, 4, 16)


@dataclass(frozen=True)
class Mixed:
    """A routed FFN, a CLEAR-MoE layer in the sorted form with a router of two layers, one in the masked form; by precision."""

    moee: MoeeModel
    data: TensorSet
    root: Path

    def folder(self, precision="fp32"):
        path = self.root / precision
        if not path.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("exporter.forms.clear.MIN_SEGMENT", 1)
                torch.manual_seed(0)  # the dense model is drawn again
                export(self.moee, path, source=self.root / "model", precision=precision)
        return path

    def copy(self, target, precision="fp32"):
        import shutil

        shutil.copytree(self.folder(precision), target)
        return target

    def check(self, folder):
        return check_parity(folder, self.moee, self.data, sizes=SIZES)


@pytest.fixture(scope="module")
def mixed(tiny_export, tmp_path_factory) -> Mixed:
    moee = copy.deepcopy(tiny_export.moee)
    layers = {
        SORTED: random_layer(experts=3, ranks=(6, 2, 5, 3), dim=32, hidden=128, width=9, seed=1),
        MASKED: random_layer(experts=4, ranks=(6, 0, 5, 0), dim=32, hidden=128, seed=2),
    }
    for name, layer in layers.items():
        replace_module(moee.model, name, layer)
    root = tmp_path_factory.mktemp("mixed-export")
    checkpoint.save(moee, root / "model")
    return Mixed(checkpoint.load(root / "model"), tiny_export.data, root)


def test_a_model_of_both_kinds_passes(mixed):
    assert read_manifest(mixed.folder(), "export.json", "moee.export/1")["clear_forms"] == {SORTED: "sorted", MASKED: "masked"}
    result = verify(mixed.folder(), mixed.moee, mixed.data, sizes=SIZES, images=0)
    assert result, result.cases()
    assert [(layer.name, layer.kind) for layer in result.parity.layers] == [
        (ROUTED, "moee"), (SORTED, "clear-moe"), (MASKED, "clear-moe"),
    ]  # fmt: skip
    for layer in result.parity.layers:
        assert layer.tokens == 8 * 17 and layer.agreement == 1.0 and layer.wrong_routes == 0
        for stats, allowed in ((layer.local, layer.local_tolerance), (layer.probe, layer.probe_tolerance)):
            assert 0 < stats.max_abs_error <= allowed < 1e-4 * stats.rms
    details = {(c.group, c.name): c.detail for c in result.cases()}
    assert details["weights", SORTED] == "tensorrt.onnx holds the model's weights and computes the layer"
    assert details["weights", ROUTED] == "tensorrt.onnx holds the model's weights"


def flipped_weight(folder):
    damage.change_store(folder, SORTED, "up_in", damage.flip_largest)


def swapped_residual_experts(folder):
    def change(w):  # shared rows first, then three rows an expert
        w[5:8], w[8:11] = w[8:11].copy(), w[5:8].copy()
        return w

    damage.change_store(folder, SORTED, "down_out", change)


def swapped_rows_in_the_portable_graph(folder):
    def change(stored):
        a, b = f"{SORTED}/up_rows_0", f"{SORTED}/up_rows_1"
        stored[a], stored[b] = stored[b], stored[a]

    damage.change_constants(folder, change)


def rolled_router_bias(folder):
    damage.change_store(folder, SORTED, "router_bias", lambda b: np.roll(b, 1) + np.float32([0, 0, 2]))


def swapped_mask_in_the_tensorrt_graph(folder):
    damage.change_constants(folder, lambda stored: stored[f"{SORTED}/down_mask"].__setitem__(slice(0, 2), (
        stored[f"{SORTED}/down_mask"][1::-1].copy()
    )), "tensorrt.onnx")  # fmt: skip


def other_activation_in_the_tensorrt_graph(folder):
    model = onnx.load(folder / "tensorrt.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "Gelu" and n.name.startswith(f"{SORTED}/"))
    node.op_type = "Relu"
    del node.attribute[:]
    onnx.save(model, folder / "tensorrt.onnx")
    rehash(folder)


def no_relu_in_the_tensorrt_router(folder):
    model = onnx.load(folder / "tensorrt.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "Relu" and n.name.startswith(f"{SORTED}/"))
    node.op_type = "Identity"
    onnx.save(model, folder / "tensorrt.onnx")
    rehash(folder)


# where the first deviation lies, what the message says, whether the portable graph is damaged too
DAMAGE = {
    flipped_weight: ("weights", "up_in: 1 of", True),
    swapped_residual_experts: ("weights", "down_out: 192 of", True),
    swapped_rows_in_the_portable_graph: ("output", "the layer alone is off by", True),
    rolled_router_bias: ("weights", "router_bias: 3 of 3", True),
    swapped_mask_in_the_tensorrt_graph: ("weights", "tensorrt.onnx: the layer alone is off by", False),
    other_activation_in_the_tensorrt_graph: ("weights", "tensorrt.onnx: the layer alone is off by", False),
    no_relu_in_the_tensorrt_router: ("weights", "tokens take an expert that is not their best", False),
}


@pytest.mark.parametrize("plant", DAMAGE)
def test_planted_damage_is_caught_and_its_layer_named(mixed, tmp_path, plant):
    folder = mixed.copy(tmp_path / "export")
    plant(folder)
    result = mixed.check(folder)
    where, message, portable = DAMAGE[plant]
    assert not result and result.first_deviation.layer == SORTED and result.first_deviation.where == where
    assert message in result.first_deviation.message
    judged = {layer.name: layer for layer in result.layers}
    assert judged[SORTED].passed != portable and judged[ROUTED].passed and judged[MASKED].passed
    assert {p.layer for p in result.weight_problems} <= {SORTED}


def test_a_missing_node_is_a_problem_and_no_traceback(mixed, tmp_path):
    folder = mixed.copy(tmp_path / "export")
    model = onnx.load(folder / "tensorrt.onnx", load_external_data=False)
    next(n for n in model.graph.node if n.name == f"{MASKED}/up_inward").output[0] = "renamed"
    next(n for n in model.graph.node if f"{MASKED}/up_inward" in n.input).input[1] = "renamed"
    onnx.save(model, folder / "tensorrt.onnx")
    result = mixed.check(folder)
    assert not result and result.first_deviation.layer == MASKED
    assert f"no node {MASKED}/up_inward" in result.first_deviation.message


def test_an_export_without_named_values_says_to_export_again(mixed, tmp_path):
    folder = mixed.copy(tmp_path / "export")
    model = onnx.load(folder / "portable.onnx", load_external_data=False)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [n.replace(f"{SORTED}/tokens", "old") for n in names]
    onnx.save(model, folder / "portable.onnx")
    with pytest.raises(UserError, match=f"no value {SORTED}/tokens.*export it again"):
        mixed.check(folder)


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_typed_exports_pass_and_their_damage_is_caught(mixed, tmp_path, precision):
    folder = mixed.copy(tmp_path / "export", precision)
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    types = {t.name: t.data_type for t in onnx.load(folder / "tensorrt.onnx", load_external_data=False).graph.initializer}
    for part, wanted in (("up_mask", onnx.TensorProto.BOOL), ("down_ones", half)):
        assert types[f"{SORTED}/{part}"] == wanted
    assert {types[n] for n in types if n.endswith(("router_bias", "router_hidden_bias"))} == {onnx.TensorProto.FLOAT}
    onnx.checker.check_model(str(folder / "portable.onnx"), full_check=True)
    result = mixed.check(folder)
    assert result, (result.first_deviation, result.weight_problems)
    swapped_residual_experts(folder)
    damaged = mixed.check(folder)
    assert not damaged and damaged.first_deviation.layer == SORTED and not damaged.layers[1].output_passed


def test_typed_layers_score_in_float32(mixed):
    """The router's hidden layer overflows float16, its float32 features do not."""
    half = routed_layers(typed(mixed.moee.model, torch.float16))["model." + SORTED]
    assert half.router.dtype == half.up_in.dtype == torch.float16
    assert half.router_bias.dtype == half.router_hidden_bias.dtype == torch.float32
    half.router_hidden.data *= 1000
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).half() * 100
    exact = copy.deepcopy(half).double()
    scores, bound = scores_and_bound(exact, x)
    assert float((x @ half.router_hidden.T).abs().max()) == float("inf")
    assert torch.isfinite(scores).all() and (half.parts().router.scores(x).double() - scores).abs().le(bound).all()
    assert (wrong_routes(exact, x, half.routes(x)) == 0).all()


def test_yardstick_matches_the_layer_and_skips_experts_out_of_range():
    layer = random_layer(width=5).double()
    x = torch.randn(30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    routes = layer.routes(x)
    with torch.no_grad():
        torch.testing.assert_close(apply_layer(layer, x, routes), layer(x))
        y = apply_layer(layer, x, torch.where(torch.arange(30)[:, None] < 3, 7, routes))
    assert (y[:3] == 0).all() and (y[3:] != 0).any(1).all()
    worst = layer.parts().router.scores(x).argmin(1, keepdim=True)
    assert (wrong_routes(layer, x, worst) > 0).all() and (wrong_routes(layer, x, torch.full_like(worst, 9)) == np.inf).all()


def without_plugin(folder: Path) -> Path:
    """Make an engine folder that of an export with no plugin nodes."""
    body = read_manifest(folder, "engine.json", "moee.engine/1", verify=False)
    body["plugin"], body["plugin_layers"] = {"file": "", "sha256": "", "headers": ""}, 0
    write_json(folder / "engine.json", body)
    return folder


def test_an_engine_without_plugin_runs_and_verifies(mixed, tmp_path):
    engine = without_plugin(write_engine(tmp_path / "engine", mixed.folder()))
    assert check_plugin(engine).passed and check_plugin(engine).message == "the engine needs no plugin"
    binding = FakeBinding(plugin=False)
    with EngineRunner(engine, binding=binding, device=CpuDevice()) as runner:
        assert runner.run(mixed.data.images[:2].numpy())[0].shape == (2, 10) and binding.libraries == []
    body = json.loads((engine / "engine.json").read_text()) | {"plugin_layers": 2}
    write_json(engine / "engine.json", body)
    with pytest.raises(UserError, match="names no plugin library for its 2 plugin layers"):
        check_plugin(engine)


def test_commands_on_a_mixed_model(mixed, tmp_path, capsys, monkeypatch):
    """What `export` wrote goes through verify, inspect, plots and report without a traceback."""
    monkeypatch.setattr("moee.data.sources.load_data", lambda *args, **kwargs: mixed.data)
    mixed.folder()
    run, model = tmp_path / "verify", str(mixed.root / "model")
    assert cli.main(["verify", str(mixed.folder()), "--maxShapes", "8", "--images", "16", "--bisect", "--out", str(run)]) == 0
    text = capsys.readouterr().out
    assert "verify passed" in text and all(name in text for name in (ROUTED, SORTED, MASKED))
    assert cli.main(["inspect", model]) == 0
    assert cli.main(["plots", model, "--images", "8", "--out", str(tmp_path / "plots")]) == 0
    similarity = json.loads((tmp_path / "plots" / "similarity.json").read_text())["layers"]
    assert len(similarity[SORTED]) == 3 and len(similarity[MASKED]) == 4
    assert cli.main(["report", str(run), model, str(tmp_path / "plots"), "--out", str(tmp_path / "r.html")]) == 0
    assert SORTED in (tmp_path / "r.html").read_text()
