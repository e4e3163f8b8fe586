"""Every architecture: extraction, export, parity with ONNX Runtime, and an engine whose plugin layers are the routed layers.

Cut-down models run by default; the full-size DeiT, Swin and ConvNeXt with random weights are marked slow.
"""

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from exporter.engines.build import build_engines
from exporter.graph.export import export
from exporter.parity import check_parity
from moee.artifacts.checkpoint import load, save
from moee.artifacts.model import MoeeModel
from moee.data.sources import load_data
from moee.data.transform import model_transform
from moee.layers.routed import routed_layers
from moee.methods.recipe import Recipe, method_options
from moee.mlps.find import find_ffns
from moee.models.model import ModelSpec, load_model
from tests.conftest import extract
from tests.plugins import built

VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
SWIN = dict(img_size=64, embed_dim=16, depths=(2, 1), num_heads=(2, 2), num_classes=10)  # the second block shifts its windows
CONVNEXT = dict(dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_classes=10)  # `test_convnext`: 160 pixels, tanh GELU
SMALL = {
    "deit, distilled": ("deit_tiny_distilled_patch16_224", VIT),  # the plain ViT is in test_export_and_parity.py
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "window_size": 4}),
    "swin, rectangles": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": (32, 64), "window_size": 4}),
    "convnext": ("test_convnext", CONVNEXT),
}
FULL = {
    **{f"deit_{size}_patch16_224": {} for size in ("tiny", "small", "base")},
    **{f"swin_{size}_patch4_window7_224": {} for size in ("tiny", "small", "base")},
    **{f"convnext_{size}": {} for size in ("tiny", "small", "base")},
}
VARIANTS = {
    "convnext_tiny": {"conv_mlp": True},
    "swinv2_tiny_window8_256": {},
    "deit_tiny_distilled_patch16_224": {},
}
HAS_BUILDER = importlib.util.find_spec("tensorrt_rtx") is not None


def write_images(folder: Path, count: int, size: int) -> Path:
    """An image folder: coloured noise around a few patterns, so that tokens form clusters."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 256, (4, size // 8, size // 8, 3), np.uint8)
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = np.asarray(Image.fromarray(patterns[i % 4]).resize((size, size), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(coarse + random.integers(-20, 21, coarse.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i}.png")
    return folder


def extracted(name: str, kwargs: dict, folder: Path, images: int, tokens: int):
    """A MoEE model of four k-means experts a layer from a dense one with random weights, its held-out images, its folder."""
    spec = ModelSpec(name=name, timm_name=name, kwargs=kwargs, random_seed=0)
    torch.manual_seed(0)
    model = load_model(spec)
    with torch.no_grad():  # LayerScale starts at 1e-6, which would hide every MLP
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gamma"):
                parameter.fill_(0.5)
    weights = folder / "dense.safetensors"  # the artifact's dense model is built from a weight file, as a user's would be
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
    spec = spec.model_copy(update={"weights": str(weights), "random_seed": None})
    transform = model_transform(model)
    source = str(write_images(folder / "images", images, transform.shape[1]))
    config = method_options(
        clustering="kmeans", clusters=4, components=8, cluster_tokens=tokens, tokens=4 * tokens, keep=0.9, compensation="mean"
    )
    extract(model, load_data(source, transform), config)
    moee = MoeeModel(model.eval(), spec, Recipe.of(config), source)
    return moee, load_data(source, transform, "val")


def check_export(moee: MoeeModel, held_out, folder: Path) -> int:
    """Every MLP is routed, the artifact survives its folder, and ONNX Runtime agrees; returns the routed layers."""
    layers = routed_layers(moee.model)
    assert len(layers) == len(find_ffns(moee.dense()).ffns) and all(layer.num_experts > 1 for layer in layers.values())
    save(moee, folder / "artifact")
    export(load(folder / "artifact"), folder / "export")
    result = check_parity(folder / "export", moee, held_out)
    assert result, result
    assert result.top1_agreement in (1.0, None)  # none of a model that gives every image the same class
    return len(layers)


def check_build(folder: Path, layers: int):
    """Both engines are built on the CPU, with a plugin layer for every routed layer."""
    report = build_engines(folder / "export", folder / "engine", plugin=built.plugin(), batch=(1, 2, 4))
    assert report.plugin_layers == layers
    return report


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * ("rectangles" in c)) for c in SMALL])
def test_small_models(case, tmp_path):
    """Distilled tokens, windows, [B, H, W, C]: parity, and where the builder is installed, engines."""
    name, kwargs = SMALL[case]
    moee, held_out = extracted(name, kwargs, tmp_path, images=60, tokens=400)
    layers = check_export(moee, held_out, tmp_path)
    if HAS_BUILDER:
        check_build(tmp_path, layers)


@pytest.mark.skipif(not HAS_BUILDER, reason="needs the extra rtx")
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FULL)
def test_paper_architectures(name, record_property):
    """The nine models of the paper with random weights at 224 pixels: export, parity, CPU engine."""
    # not tmp_path: pytest would keep gigabytes of weights of the last three runs
    with tempfile.TemporaryDirectory(prefix="moee-") as temporary:
        folder = Path(temporary)
        moee, held_out = extracted(name, FULL[name], folder, images=42, tokens=1000)
        layers = check_export(moee, held_out, folder)
        report = check_build(folder, layers)
        record_property("dense_build_s", report.dense.build_s)
        record_property("moee_build_s", report.moee.build_s)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_export_with_parity(name):
    """ConvNeXt with convolutional MLPs, Swin v2, the distilled DeiT at full size."""
    with tempfile.TemporaryDirectory(prefix="moee-") as temporary:
        moee, held_out = extracted(name, VARIANTS[name], Path(temporary), images=42, tokens=1000)
        check_export(moee, held_out, Path(temporary))
