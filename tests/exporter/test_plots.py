"""Plots: the numbers are right, every figure is drawn, the same numbers give the same bytes."""

import json
import xml.dom.minidom

import pytest
import torch

from exporter import cli
from exporter.plots import draw, plot_data, write_plots
from exporter.plots.ablation import draw_ablation
from exporter.plots.figure import to_svg
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.data.image_set import batches
from moee.data.transform import model_transform
from moee.interface.watch import watched
from moee.layers.routed import routed_layers
from moee.methods.recipe import Recipe
from moee.mlps.find import find_ffns
from tests.conftest import tiny_spec


@pytest.fixture
def artifact(tiny_moee):
    model, _, data, config, _ = tiny_moee
    return MoeeModel(model.eval(), tiny_spec(), Recipe.of(config), "digits"), data


def test_routing_is_counted_by_class(artifact):
    moee, data = artifact
    numbers = plot_data.routing_by_class(plot_data.trace_routes(moee, data))
    assert numbers["classes"] == [0, 1, 2, 3] and numbers["images"] == [12] * 4
    name, layer = next(iter(routed_layers(moee.model).items()))
    seen = {}
    handle = layer.register_forward_pre_hook(lambda module, args: seen.update(routes=module.routes(args[0])))
    images = next(batches(data, 48)).images
    moee.model(images)
    handle.remove()
    routes = seen["routes"].reshape(48, -1)
    for label in range(4):
        mine = routes[torch.tensor(data.labels) == label].flatten()
        expected = torch.bincount(mine, minlength=layer.num_experts) / len(mine)
        assert numbers["layers"][name][label] == pytest.approx(expected.tolist(), rel=1e-5)


def test_rows_have_the_names_of_the_classes(artifact):
    moee, data = artifact
    data.classes, data.labels[0] = ("$5 note", "b" * 40, "日本", "d"), -1
    numbers = plot_data.routing_by_class(plot_data.trace_routes(moee, data))
    assert numbers["names"] == ["no label", *data.classes] and numbers["images"] == [1, 11, 12, 12, 12]
    ticks = [tick.get_text() for tick in draw.routing(numbers).axes[0].get_yticklabels()]
    assert ticks == ["no label", r"\$5 note", "b" * 19 + "…", "日本", "d"]


def test_trace_takes_a_part_of_the_images_and_unlabelled_ones(artifact):
    moee, data = artifact
    data.labels = [-1] * len(data)
    trace = plot_data.trace_routes(moee, data, images=5)
    assert trace.indices.tolist() == [0, 12, 24, 35, 47] and plot_data.routing_by_class(trace)["classes"] == [-1]
    assert plot_data.routing_by_class(trace)["names"] == ["all"]
    assert all(grid == (1, 4, 4) for grid in trace.grids.values()), "a class token, then 4 x 4 patches"


def test_similarity_is_the_cosine_of_router_rows(artifact):
    moee, _ = artifact
    numbers = plot_data.router_similarity(moee.model)["layers"]
    for name, layer in routed_layers(moee.model).items():
        rows = layer.router.detach()
        expected = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        torch.testing.assert_close(torch.tensor(numbers[name]), expected, rtol=1e-4, atol=1e-5)


def test_curves_are_sorted_moments_of_the_dense_activations(artifact):
    moee, data = artifact
    dense = moee.dense()
    numbers = plot_data.neuron_curves(dense, data)
    assert numbers["tokens"] == 48 * 17
    ffn = find_ffns(dense).ffns[0]
    seen = {}
    dense.get_submodule(ffn.name).act.register_forward_hook(lambda module, args, out: seen.update(hidden=out.flatten(0, 1)))
    with torch.no_grad():
        dense(torch.stack([data.load(i) for i in range(48)]))
    hidden = seen["hidden"].double()
    curve = numbers["layers"][ffn.name]
    assert curve["variance"] == pytest.approx(hidden.var(0, correction=0).sort(descending=True).values.tolist(), rel=2e-2)
    assert curve["mean"] == pytest.approx(hidden.mean(0).sort(descending=True).values.tolist(), rel=2e-2, abs=1e-3)


def test_patches_are_the_nearest_tokens_of_their_expert(artifact):
    """Held against every token's cosine: of each image the nearest one that the expert gets, and of these the nearest images."""
    moee, data = artifact
    trace = plot_data.trace_routes(moee, data, images=40)  # two batches
    numbers = plot_data.expert_patches(trace, per_expert=3)
    assert numbers["left_out"] == {} and list(numbers["layers"]) == list(routed_layers(moee.model))
    inputs = {}
    with watched(moee.model, routed_layers(moee.model), lambda name, x: inputs.__setitem__(name, x)), torch.no_grad():
        moee.model(torch.stack([data.load(i) for i in trace.indices.tolist()]))
    for name, experts in numbers["layers"].items():
        assert sum(e["share"] for e in experts) == pytest.approx(1, abs=1e-4)
        rows = routed_layers(moee.model)[name].router
        near = torch.nn.functional.cosine_similarity(inputs[name][:, 1:, None], rows, dim=-1)  # without the class token
        for e, expert in enumerate(experts):
            own = near[..., e].masked_fill(trace.routes[name][:, 1:, 0] != e, -2)
            best, token = own.max(1)
            expected = [i for i in best.sort(descending=True).indices.tolist() if best[i] > -2][:3]
            found = [(p["image"], 1 + p["top"] // 8 * 4 + p["left"] // 8) for p in expert["patches"]]
            assert found == [(int(trace.indices[i]), 1 + int(token[i])) for i in expected]
            assert [p["cosine"] for p in expert["patches"]] == pytest.approx([float(best[i]) for i in expected], abs=1e-5)
            assert all(p["height"] == p["width"] == 8 for p in expert["patches"])


def test_a_layer_without_a_grid_or_a_row_is_left_out_and_said(artifact):
    moee, data = artifact
    trace = plot_data.trace_routes(moee, data, images=4)
    first, second, *_ = trace.routes
    trace.grids[first] = None
    del trace.nearest[second]
    numbers = plot_data.expert_patches(trace)
    assert numbers["left_out"] == {first: plot_data.NO_GRID, second: plot_data.NO_ROW}
    assert not {first, second} & numbers["layers"].keys()


def test_every_figure_is_drawn_the_same_twice(artifact):
    moee, data = artifact
    trace = plot_data.trace_routes(moee, data, images=8)
    transform = model_transform(moee.model)
    for make in (
        lambda: draw.routing(plot_data.routing_by_class(trace)),
        lambda: draw.similarity(plot_data.router_similarity(moee.model)),
        lambda: draw.patches(plot_data.expert_patches(trace), data, transform),
        lambda: draw.curves({"layers": {"a": {"variance": [2.0, 0.0], "mean": [1.0, -1.0]}}}),
    ):
        first = to_svg(make())
        assert first == to_svg(make())
        assert xml.dom.minidom.parseString(first).documentElement.tagName == "svg"


def test_command_writes_everything_and_refuses_what_exists(artifact, tmp_path, capsys, monkeypatch):
    moee, data = artifact
    checkpoint.save(moee, tmp_path / "model")
    monkeypatch.setattr("moee.data.sources.load_splits", lambda *args, **kwargs: (data, data))
    argv = ["plots", str(tmp_path / "model"), "--out", str(tmp_path / "plots")]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*argv, "--images", "0"])
    assert cli.main(argv) == 0
    names = {p.name for p in (tmp_path / "plots").iterdir()}
    assert names == {f"{name}.{kind}" for name in ("routing", "similarity", "curves", "patches") for kind in ("json", "svg")} | {
        "examples.json"
    }
    assert json.loads((tmp_path / "plots" / "routing.json").read_text())["schema"] == "moee.plot-routing/1"
    assert cli.main(argv) == 2 and "exists" in capsys.readouterr().err
    with pytest.raises(ValueError, match="exists"):
        write_plots(moee, data, data, tmp_path / "plots")
    assert cli.main([*argv, "--force"]) == 0
    capsys.readouterr()
    (tmp_path / "plots" / "curves.svg").write_text("<svg>retouched</svg>")
    assert cli.main([*argv, "--force"]) == 2
    assert "its curves.svg is not the file that moee wrote" in capsys.readouterr().err
    assert (tmp_path / "plots" / "curves.svg").read_text() == "<svg>retouched</svg>"


def test_ablation_command(tmp_path, capsys, monkeypatch):
    """The command from end to end on a tiny model; what it refuses is one sentence."""
    from tests.conftest import tiny_images

    monkeypatch.setattr("exporter.pretrained.resolve", lambda *args, **kwargs: tiny_spec(num_classes=0))
    splits = tiny_images(40, classes=10), tiny_images(40, classes=10)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: splits)
    scale = ["--tokens", "600", "--cluster-tokens", "300", "--components", "8", "--min-cluster-size", "0.02"]
    rows = ["--tables", "2", "--seeds", "1", "--compensation", "mean", "--keep", "0.7,0.9"]
    argv = ["ablate", *rows, *scale, "--out", str(tmp_path / "a")]
    assert cli.main(argv) == 0
    assert "Table 2, routing helps, compensation mean, by accuracy:" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"setup.json", "cells", "ablation.json", "table.md", "table2.svg"}
    for extra, message in ((["--components", "9"], "components 8, now 9"), (["--keep", "much"], "expected numbers"),
                           (["--tables", "5"], "unknown table 5")):  # fmt: skip
        assert cli.main([*argv, *extra]) == 2
        assert message in capsys.readouterr().err
    table = (tmp_path / "a" / "table.md").read_text()
    assert "Dense accuracy 100.00% (91.2% to 100.0%)." in table and "accuracy (95 % interval)" in table
    monkeypatch.setattr("exporter.pretrained.resolve", lambda *args, **kwargs: tiny_spec())
    assert cli.main([*argv, "--force"]) == 0
    said = "accuracy is not compared: the model's head has the weights that --random-weights drew"
    text = capsys.readouterr().out
    assert said in text and "by accuracy" not in text
    assert said.capitalize() in (tmp_path / "a" / "table.md").read_text()


def test_nothing_is_drawn_for_a_table_without_figures(tmp_path):
    row = {"row": "MoEE", "compensation": "none", "point": "0.90", "macs_change": None, "accuracy": None, "class_cosine": None}
    assert draw_ablation({"tables": {"7": {"rows": [row]}}}, tmp_path) == []
