"""Rectangular models through every command, and the shapes that a manifest or a flag may state."""

import json

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from exporter.graph.export import export
from exporter.manifests import Input, exported_model, input_shape, read_export
from exporter.parity import check_parity
from exporter.plots import data as plot_data
from exporter.report.collect import collect
from exporter.report.commands import commands
from exporter.ship.contents import make_preprocessing
from exporter.ship.deployment import write_deployment
from exporter.timing.profile import batch_profile
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.data.image_set import TensorSet
from moee.data.sources import load_data
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.methods.recipe import Recipe, method_options
from moee.models.model import load_model
from moee.schema import checked
from tests.conftest import extract, tiny_spec
from tests.exporter.command import run
from tests.exporter.test_bundle_runner import ours
from tests.plugins import built

SCALE = ("--clustering", "kmeans", "--clusters", 2, "--components", 4, "--tokens", 400, "--compensation", "mean", "--threads", 1)
SIZES = {"test_vit": (96, 64), "test_convnext": (64, 96)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of upright pictures, in train/ and val/."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = root / ("val" if i % 3 == 0 else "train") / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 4, 3), np.uint8)).resize((70 + i, 120 - i), Image.Resampling.BICUBIC)
        coarse.save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module", params=["test_vit", pytest.param("test_convnext", marks=pytest.mark.slow)])
def chain(request, pictures, tmp_path_factory):
    """Folder of a rectangular model's artifact, tuned artifact and export, all from the command line; its size."""
    name, (height, width) = request.param, SIZES[request.param]
    root = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    model = timm.create_model(name, **({"img_size": (height, width)} if name == "test_vit" else {}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, root / "dense.safetensors")
    shape = ("--img-size", height, width)
    common = (name, "--weights", root / "dense.safetensors", *shape, "--data", pictures)
    assert run("extract", *common, *SCALE, "--out", root / "extracted") == 0
    assert run("finetune", root / "extracted", "--epochs", 1, "--batch-size", 8, "--threads", 1, "--out", root / "tuned") == 0
    assert run("export", root / "tuned", "--out", root / "export") == 0
    return root, (height, width), common


def test_graphs_take_the_rectangle(chain):
    root, size, _ = chain
    for name in ("dense", "portable", "tensorrt"):
        graph = onnx.load(root / "export" / f"{name}.onnx", load_external_data=False).graph
        dims = graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_value for d in dims[1:]] == [3, *size] and dims[0].dim_param == "batch"
    manifest = json.loads((root / "export" / "export.json").read_text())
    assert input_shape(manifest["input"]) == (3, *size) and manifest["input"]["size"] == list(size)


def test_verify_bench_and_inspect_at_the_rectangle(chain, capsys):
    root, (height, width), _ = chain
    assert run("verify", root / "export", "--images", 8, "--out", root / "verify") == 0
    assert json.loads((root / "verify" / "parity.json").read_text())["passed"] is True
    assert run("bench", root / "export", "--runs", 2, "--duration", 0, "--throughput", 0, "--batch", 1) == 0
    capsys.readouterr()
    assert run("inspect", root / "tuned", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["size"] == [height, width] and told["channels"] == 3
    assert run("inspect", root / "tuned") == 0 and f"at {height} x {width}" in capsys.readouterr().out
    assert run("inspect", root / "tuned", "--img-size", 64) == 2 and "has a size of its own" in capsys.readouterr().err


def test_patches_of_a_rectangle_lie_on_its_grid(chain, pictures):
    root, (height, width), _ = chain
    moee = checkpoint.load(root / "tuned")
    trace = plot_data.trace_routes(moee, load_data(str(pictures), model_transform(moee.model), "val"), 4)
    grids = list(trace.grids.values())
    assert all(grid is not None and grid[1] * width == grid[2] * height for grid in grids), grids
    numbers = plot_data.expert_patches(trace)
    patches = [p for layer in numbers["layers"].values() for expert in layer for p in expert["patches"]]
    assert numbers["size"] == [height, width] and max(p["top"] + p["height"] for p in patches) == height
    assert max(p["left"] + p["width"] for p in patches) == width and all(p["height"] == p["width"] for p in patches)


def test_the_bundle_prepares_pictures_as_the_accuracy_saw_them(chain, pictures, tmp_path):
    root, (height, width), _ = chain
    out = write_deployment(root / "export", tmp_path / "bundle", 87, built.kernels)
    assert f"x{height}x{width}" in (out / "bundle.env").read_text()
    assert f"infer-dims=3;{height};{width}" in (out / "deepstream" / "config_infer_moee.txt").read_text()
    data = load_data(str(pictures), model_transform(checkpoint.load(root / "tuned").model), "val")
    recipe = make_preprocessing(exported_model(read_export(root / "export"), root / "export")[1], "model")
    for i in range(3):
        np.testing.assert_allclose(ours(data.picture(i), recipe, tmp_path), data.load(i).numpy(), rtol=0, atol=1e-6)


def test_a_plan_is_for_one_size_and_says_how_to_apply_it(pictures, tmp_path, capsys):
    def argv(out, *size):
        return ("test_convnext", "--random-weights", 0, "--data", pictures, "--img-size", *size, "--out", tmp_path / out)

    scale = ("--methods", "static", "--tokens", 400, "--refit-tokens", 400)
    assert run("plan", *argv("plan", 64, 96), "--target-macs", 0.9, *scale) == 0
    assert "--img-size 64 96 " in " ".join(capsys.readouterr().out.split())
    assert run("extract", *argv("other", 96, 64), "--plan", tmp_path / "plan") == 2
    assert "with input_size [64, 96], but this model has [96, 64]; plan again" in capsys.readouterr().err
    assert run("extract", *argv("same", 64, 96), "--plan", tmp_path / "plan") == 0


def test_a_bundle_of_grey_images_is_refused_before_kernels_are_compiled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("exporter.engines.plugin_cache.ensure_kernels", lambda *args: pytest.fail("compiled"))
    model = load_model(tiny_spec(in_chans=1))
    images = TensorSet("grey", torch.randn(24, 1, 32, 32), [-1] * 24)
    config = method_options(clustering="kmeans", clusters=2, cluster_tokens=200, components=4, compensation="mean")
    extract(model, images, config)
    export(MoeeModel(model.eval(), tiny_spec(in_chans=1), Recipe.of(config), "grey"), tmp_path / "export")
    assert json.loads((tmp_path / "export" / "export.json").read_text())["input"]["channels"] == 1
    grey = MoeeModel(model, tiny_spec(in_chans=1), Recipe.of(config), "grey")
    assert check_parity(tmp_path / "export", grey, images, sizes=(1, 4))
    assert run("bundle", tmp_path / "export", "--sm", 87, "--out", tmp_path / "bundle") == 2
    assert "takes images of 1 channel; the bundle knows RGB alone" in capsys.readouterr().err


def test_shapes_of_an_engine_are_those_of_the_graph(chain):
    root, (height, width), _ = chain
    assert batch_profile(root / "export", None, f"input:4x3x{height}x{width}", None) == (1, 4, 32)
    with pytest.raises(UserError, match=f"it takes input:Bx3x{height}x{width}"):
        batch_profile(root / "export", None, f"4x3x{width}x{height}", None)


def test_the_report_repeats_the_size(chain):
    root, (height, width), _ = chain
    assert any(f"--img-size {height} {width}" in line for line in commands(collect([root])))


GOOD = {"name": "input", "size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}


def test_an_older_manifest_is_a_square_of_three_channels():
    assert input_shape(checked(Input, GOOD, "export.json").model_dump()) == (3, 32, 32)
    given = {**GOOD, "size": [96, 64], "channels": 1, "mean": [0.5], "std": [0.5]}
    assert input_shape(checked(Input, given, "export.json").model_dump()) == (1, 96, 64)


@pytest.mark.parametrize(
    "change",
    [{"size": size} for size in (0, -1, 4097, True, "32", 32.0, [], [96], [96, 0], [96, 5000], [1, 2, 3], [96, "64"], None)]
    + [{"channels": channels} for channels in (0, 1, 4, 2000, "3", None)]
    + [{"mean": [0.5] * 2}, {"std": [0.5] * 4}, {"std": [0.5, 0.5, 0.0]}, {"mean": []}],
)
def test_shapes_of_a_manifest_are_bounded(change):
    with pytest.raises(UserError, match="^export.json: "):
        checked(Input, {**GOOD, **change}, "export.json")


def test_a_size_that_does_not_fit_is_refused_before_any_work(tmp_path, pictures, capsys):
    for size, said in (((65,), "patches of 16 x 16"), ((96, 64, 3), "height and width")):
        argv = ("test_vit", "--random-weights", 0, "--data", pictures, "--img-size", *size)
        assert run("extract", *argv, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error and len(error.splitlines()) == 1
    assert run("extract", *argv[:-1], -1, "--out", tmp_path / "out") == 2
    assert "1 to 4096" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
