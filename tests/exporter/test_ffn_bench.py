"""The bench of single layers: real tokens, ideal by MACs, sums over layers."""

import numpy as np
import pytest
import torch

from exporter.graph.trace import to_onnx
from exporter.timing.ffn_bench import FFNSpeed, ffn_speeds, ideal_speedup, image_tokens, layer_inputs, lowered, overall
from moee.artifacts.model import MoeeModel
from moee.errors import UserError
from moee.layers.routed import RoutedFFN, routed_layers
from tests.conftest import tiny_spec
from tests.moee.reference import random_problem
from tests.moee.test_ops import layer_of


def test_layers_of_a_model(tiny_export):
    moee = tiny_export.moee
    rows = ffn_speeds([moee, moee], tiny_export.data, tokens=50, runs=2)
    assert [r.name for r in rows if r.model == 0] == list(routed_layers(moee.model)) == [r.name for r in rows if r.model == 1]
    for row in rows:
        assert row.tokens == 48 and row.dense_ms > 0 and (row.ours_s > 0).all() and row.ideal > 1
        assert row.dense_s.shape == row.ours_s.shape == (2,)
    assert image_tokens(moee, tiny_export.data) == 17  # 16 patches and the class token


def test_an_activation_that_the_operator_lacks_is_timed_in_standard_operators(monkeypatch, tmp_path):
    layer = layer_of(random_problem(2, 16, 24, [8, 8], activation="silu"))
    for known, node in (("silu", True), ("relu", False)):
        monkeypatch.setattr("exporter.timing.ffn_bench.CPU_ACTIVATIONS", (known,))
        content = lowered(to_onnx(layer.eval(), torch.randn(2, 4, 16)), tmp_path / "0.onnx").read_bytes()
        assert (b"MoeeFfn" in content) == node, known


def test_inputs_are_the_tokens_that_the_layer_sees(tiny_export):
    moee = tiny_export.moee
    layers = {n: layer for n, layer in routed_layers(moee.model).items() if isinstance(layer, RoutedFFN)}
    name, seen = next(iter(layers)), []
    handle = layers[name].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = layer_inputs(moee.model, layers, tiny_export.data, 30)
    handle.remove()
    assert torch.equal(found[name], seen[0].reshape(-1, seen[0].shape[-1])[:30])


def test_ideal_counts_router_and_the_experts_taken():
    layer = layer_of(random_problem(9, 16, 24, [4, 20])).eval()
    x = torch.randn(64, 16)
    share = torch.bincount(layer.routes(x)[:, 0], minlength=2) / 64
    width = float(share @ torch.tensor([4.0, 20.0]))
    assert ideal_speedup(2 * 16 * 64, layer, x) == pytest.approx(2 * 16 * 64 / (2 * 16 + 2 * 16 * width))


def test_sums_weigh_by_dense_time():
    """Round by round: two layers that are disturbed in different rounds."""
    slow, fast = np.array([4.0] * 20), np.array([2.0] * 20)
    slow[3], fast[5] = 40.0, 20.0
    rows = [FFNSpeed(0, "a", 8, slow, slow / 2, 4.0), FFNSpeed(0, "b", 8, fast, fast / 2, 2.0)]
    speed, ideal = overall(rows)
    assert (speed.ratio, speed.low, speed.high, ideal) == (2.0, 2.0, 2.0, 3000.0 / 1000)
    assert (rows[0].dense_ms, np.median(rows[0].ours_s)) == (4000.0, 2.0)


def test_a_dense_model_is_refused(tiny_model, tiny_export):
    with pytest.raises(UserError, match="no routed MLP"):
        ffn_speeds([MoeeModel(tiny_model, tiny_spec(), None, "tiny")], tiny_export.data, 16)
