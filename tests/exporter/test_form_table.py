"""What each form of a layer costs, and what follows from it for a plan."""

import copy

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from exporter.graph.trace import to_onnx
from exporter.passes.portable import lower_routed_ffn
from exporter.timing import form_times
from exporter.timing.ffn_bench import Residual
from exporter.timing.form_table import FEWER, Forms, FormTable, between
from exporter.timing.form_times import measure_forms, undisturbed
from moee.data.image_set import image_shape
from moee.errors import OutOfReach, UserError
from moee.methods.recipe import make_recipe
from moee.methods.registry import method_of
from moee.mlps.find import find_ffns
from moee.planning.budget import Point
from moee.planning.forms import Latency, LayerChoices
from moee.planning.found import prediction_error
from moee.planning.search import Planner, Way
from moee.tokens.block import install_merging
from tests.conftest import extract

LINE = {0.25: 1.0, 0.5: 2.0, 1.0: 4.0}


def test_values_lie_on_straight_lines_between_the_measured():
    assert between(LINE, 0.375) == pytest.approx(1.5) and between(LINE, 0.75) == pytest.approx(3.0)
    assert between(LINE, 0.125) == pytest.approx(0.5) and between(LINE, 1.25) == pytest.approx(5.0)
    assert between(LINE, -1.0) == 0.0


def test_a_form_costs_no_more_than_a_wider_one():
    assert undisturbed({0.3: 0.2, 0.6: 1.9, 1.0: 0.6}) == {0.3: 0.2, 0.6: 0.6, 1.0: 0.6}


def test_a_layer_is_left_where_its_forms_are_no_faster():
    forms = {
        "fast": Forms(4.0, LINE, {8: {0.5: 2.5, 1.0: 5.0}}),
        "late": Forms(2.2, {0.25: 1.0, 0.5: 2.0, 0.7: 2.8, 1.0: 2.8}, {8: {0.5: 3.0, 1.0: 5.0}}),
        "never": Forms(2.0, {0.25: 1.0, 0.5: 2.0, 1.0: 2.0}, {8: {0.5: 2.5, 1.0: 5.0}}),
    }
    table = FormTable(8, dict.fromkeys(forms, 100), dict.fromkeys(forms, 1000.0), forms, {})
    eight, one = table.choices(0.5, 8), table.choices(0.5, 1)
    assert (eight.one_expert, eight.exclude) == (["late"], ["never"])
    assert (one.one_expert, one.exclude, one.mac_times) == ([], ["never"], {}), "all lines rise alike"
    assert eight.mac_times == {"fast": 1.1, "late": 0.89}, "5 ms a width with experts, 4 with one"
    with pytest.raises(OutOfReach, match="no MLP is faster than dense here with 100%"):
        FormTable(8, {"never": 100}, {"never": 1e3}, {"never": forms["never"]}, {}).choices(1.0, 1)


def test_a_dense_layer_whose_timing_was_disturbed_does_not_end_the_search():
    """With all neurons the static form computes the same, and took 4 ms."""
    forms = {"lucky": Forms(0.1, LINE, {8: {0.5: 2.5, 1.0: 5.0}})}
    found = FormTable(8, {"lucky": 100}, {"lucky": 1e3}, forms, {}).choices(0.5, 8)
    assert (found.one_expert, found.exclude) == ([], [])


def test_a_mac_costs_what_it_takes_in_each_layer():
    """Two layers of one width: the second has a quarter of the MACs, and takes as long."""
    forms = Forms(4.0, LINE, {})
    table = FormTable(8, {"wide": 100, "deep": 100}, {"wide": 4000.0, "deep": 1000.0}, {"wide": forms, "deep": forms}, {})
    assert table.choices(0.5, 1).mac_times == {"wide": 0.62, "deep": 2.5}


def test_the_dense_model_is_predicted_as_itself_and_a_cut_one_by_its_forms(tiny_moee, monkeypatch):
    model, dense, data, *_ = tiny_moee
    monkeypatch.setattr(form_times, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(form_times, "_mergeable", lambda dense: False)  # a graph takes a second to trace
    table = measure_forms(dense, image_shape(data.images), 2, experts=(4,), threads=1)
    names = [f.name for f in find_ffns(dense).ffns]
    assert list(table.mlps) == names and set(table.attentions) == {"blocks.0.attn", "blocks.1.attn", "blocks.2.attn"}
    assert table.mlps[names[0]] is table.mlps[names[1]], "one shape is timed once"
    assert table.predict(copy.deepcopy(dense), 5.0) == 5.0
    forms = {name: Forms(4.0, LINE, {4: {0.25: 10.0, 1.0: 10.0}}) for name in names}
    known = FormTable(2, table.hidden, table.macs, forms, {})
    assert known.predict(model, 20.0) == pytest.approx(20 + 3 * (10 - 4))


def test_a_layer_with_fewer_tokens_lies_between_its_times_of_all_and_of_half_of_them(tiny_moee):
    """Blocks of 17 tokens that merge 0, 4, 4: the second MLP has 13 of them, the last attention 13 and the last MLP 9."""
    _, dense, data, *_ = tiny_moee
    merged = copy.deepcopy(dense)
    install_merging(merged, [0, 4, 4])
    mlps, heads = ([f"blocks.{i}.{part}" for i in range(3)] for part in ("mlp", "attn"))
    table = FormTable(
        8, dict.fromkeys(mlps, 100), dict.fromkeys(mlps, 1e3), dict.fromkeys(mlps, Forms(4.0, LINE)),
        dict.fromkeys(heads, Forms(8.0, LINE)), dict.fromkeys([*mlps, *heads], 17),
        {**dict.fromkeys(mlps, Forms(3.0, LINE)), **dict.fromkeys(heads, Forms(2.0, LINE))}, {0.5: 0.25, 1.0: 0.5},
    )  # fmt: skip
    lost = 4 / 17 / FEWER  # of the way from all tokens to half of them
    merging = 0.5 + 0.5 - 0.25 * lost
    assert table.predict(merged, 100.0) == pytest.approx(100 - 1.0 * lost - 1.0 * 2 * lost - 6.0 * lost + merging)
    assert table.predict(dense, 100.0) == 100.0


def test_fewer_tokens_are_timed_where_tokens_can_merge(tiny_moee, monkeypatch):
    """What each form is timed on, without the timing: rows, tokens and width."""
    _, dense, data, *_ = tiny_moee
    timed = []

    def times(modules, inputs, threads, ffns):
        timed.append(([tuple(x.shape) for x in inputs], len(modules)))
        assert len({module(x).shape for module in modules.values() for x in inputs}) == len(inputs), "all of them do alike"
        return [{key: 1.0 + (key == 1) for key in modules} for _ in inputs]

    monkeypatch.setattr(form_times, "_times", times)
    table = measure_forms(dense, image_shape(data.images), 2, experts=(4,))
    assert timed == [
        ([(4, 8, 32), (2, 8, 32)], 8), ([(2, 17, 32)], 5), ([(2, 8, 32)], 5),  # MLPs in multiples of eight tokens
        ([(2, 8, 32)], 2), ([(2, 17, 32)], 2),
    ]  # fmt: skip
    assert set(table.fewer) == {*table.mlps, *table.attentions} and table.merge == {FEWER: 1.0, 1.0: 1.0}
    other = copy.deepcopy(dense)
    other.blocks[1] = torch.nn.Sequential(other.blocks[1])  # no block of timm's
    assert not form_times._mergeable(other)


def test_a_graph_of_one_routed_layer_serves_another(tiny_moee):
    """Another number of experts, other widths and weights: what the traced graph computes then, by standard operators."""
    _, dense, *_ = tiny_moee
    ffn = find_ffns(dense).ffns[0]
    generator = torch.Generator().manual_seed(1)
    one, other = (form_times._cut(ffn, *cut, generator) for cut in ((1.0, 4), (0.3, 3)))
    x = torch.randn(4, 8, ffn.dim)
    traced = to_onnx(Residual(one.eval()), x[:2])
    for layer in (other, one):
        graph = form_times._with_weights_of(layer, traced)
        lower_routed_ffn(graph)
        session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
        assert torch.allclose(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), x + layer(x), atol=1e-5)


@pytest.mark.slow
def test_a_merge_is_timed_by_itself(tiny_model):
    line = form_times._merge_line(tiny_model, (1, 17), 2, threads=1)
    assert set(line) == {FEWER, 1.0} and all(0 <= ms < 1000 for ms in line.values())


def test_a_plan_leaves_layers_to_what_the_device_says(tiny_model, tmp_path):
    class Times:
        def predict(self, model, dense_ms):
            return dense_ms

        def choices(self, share, experts):
            one = ["blocks.1.mlp"] if experts > 1 else []
            return LayerChoices(one_expert=one, exclude=["blocks.0.mlp"], mac_times={"blocks.1.mlp": 2.0})

    planner = Planner.__new__(Planner)
    planner.store = tmp_path
    planner.base, planner.latency = {"exclude": ("blocks.2",)}, Latency("x", lambda model: {}, Times())
    assert planner._by_layer(Way("kmeans-8", "share")) == {
        "exclude": ("blocks.2", "blocks.0.mlp"), "one_expert": ("blocks.1.mlp",)
    }  # fmt: skip
    assert planner._by_layer(Way("static", "share")) == {"exclude": ("blocks.2", "blocks.0.mlp")}
    assert planner._by_layer(Way("static", "sensitivity"))["mac_time"] == ("blocks.1.mlp=2",)
    planner.latency = Latency("x", lambda model: {})
    assert planner._by_layer(Way("kmeans-8", "share")) == {}


def test_one_expert_is_static_pruning_of_that_layer(tiny_model, tiny_moee):
    _, dense, data, *_ = tiny_moee
    options = make_recipe(values={"clusters": 4, "cluster_tokens": 300, "one_expert": ("blocks.1.mlp",)}).cut
    model = copy.deepcopy(dense)
    reports = extract(model, data, options)
    assert [report.experts for report in reports] == [4, 1, 4]
    wrong = options.model_copy(update={"one_expert": ("blocks.9.mlp",)})
    with pytest.raises(UserError, match="--one-expert blocks.9.mlp is no MLP that is cut; those are blocks.0.mlp"):
        method_of(wrong).check(dense, image_shape(data.images), wrong)
    wrong = make_recipe("static", None, {"criterion": "sensitivity", "allocation": "model", "mac_time": ("blocks.9.mlp=2",)}).cut
    with pytest.raises(UserError, match="--mac-time blocks.9.mlp is no MLP that is cut; those are blocks.0.mlp"):
        method_of(wrong).check(dense, image_shape(data.images), wrong)


def test_errors_of_a_prediction():
    def point(moee, predicted):
        latency = {"moee_ms": moee, "dense_ms": 2.0} | ({"predicted_ms": predicted} if predicted else {})
        return Point("static", "", 0.5, 0.5, 1.0, 1.0, None, None, latency, {})

    points = [point(1.0, 1.1), point(2.0, 1.0), point(1.0, 1.0), point(1.0, None)]
    assert prediction_error(points) == {"points": 3, "median": pytest.approx(0.1), "largest": 0.5}
    assert prediction_error([point(1.0, None)]) is None
