"""Models of torchvision, of transformers' folders and of the user's own on the command line: from images to a verified export."""

import json
import sys
import textwrap

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from exporter import cli
from moee import checkpoint, from_torchvision
from moee.data import evaluation, model_transform
from moee.models import build_model

transformers = pytest.importorskip("transformers")
KMEANS = ["--clusters", "2", "--cluster-tokens", "200", "--tokens", "400", "--keep", "0.9"]
STATIC = ["--preset", "static", "--keep", "0.7", "--tokens", "400"]
TINY = ["--random-weights", "0", "--img-size", "32", "--num-classes", "2"]
SMALL_VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
CODE = """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.mix = nn.Linear(16, 16)
            self.mlp = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))

        def forward(self, x):
            x = x + self.mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.mlp(self.norm2(x))

    class Mine(nn.Module):
        def __init__(self, dim=32, image_size=32, seed=0, classes=2):
            super().__init__()
            torch.manual_seed(seed)
            self.image_size = image_size
            self.cut = nn.Conv2d(3, dim, 8, 8)
            self.blocks = nn.Sequential(Block(dim), Block(dim))
            self.fc = nn.Linear(dim, classes)

        def forward(self, x):
            return self.fc(self.blocks(self.cut(x).flatten(2).transpose(1, 2)).mean(1))

    def mine(**kwargs):
        return Mine(**kwargs)

    def needs(width):
        return Mine(width)

    def nothing():
        return {"model": Mine()}

    def raises():
        raise RuntimeError("no such file\\nsecond line")

    def changing():
        import os
        return Mine(seed=int.from_bytes(os.urandom(4), "big"))

    def sizeless():
        return Mine(image_size=None)

    constant = 3
"""


def run(*words):
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as exit:
        return exit.code


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with images of two classes and a module `mymodels`, current."""
    monkeypatch.chdir(tmp_path)
    source = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = source.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    (tmp_path / "mymodels.py").write_text(textwrap.dedent(CODE))
    yield tmp_path
    for name in ("mymodels", "effects"):
        sys.modules.pop(name, None)


def hf_folder(path, kind, config, processor=None, **save):
    torch.manual_seed(0)
    net = getattr(transformers, kind)(config)
    net.save_pretrained(path, **save)
    if processor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return net.eval()


def small(kind, **more):
    return getattr(transformers, f"{kind}Config")(**{**SMALL_VIT, **more})


def clip(**more):
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=50)
    return transformers.CLIPConfig(vision_config=SMALL_VIT, text_config=text, projection_dim=24, **more)


def siglip(**more):
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=50)
    return transformers.SiglipConfig(vision_config={**SMALL_VIT, "hidden_act": "gelu_pytorch_tanh"}, text_config=text, **more)


SQUASH = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}, "resample": 2}
HF = {
    "vit": lambda p: hf_folder(p, "ViTForImageClassification", small("ViT"), SQUASH),
    "dinov2": lambda p: hf_folder(p, "Dinov2Model", small("Dinov2", image_size=56)),
    "clip": lambda p: hf_folder(p, "CLIPModel", clip()),
    "siglip": lambda p: hf_folder(p, "SiglipModel", siglip()),
}


def chain(model, method, place, word=()):
    """extract, export and verify as a user does."""
    assert run("extract", *model, "--data", "images", *method, "--out", "extracted") == 0
    assert run("export", "extracted", *word, "--out", "exported") == 0
    assert run("verify", "exported", *word, "--out", "verified") == 0
    assert json.loads((place / "verified" / "parity.json").read_text())["passed"] is True
    moee = checkpoint.load("extracted", word[1] if word else None)
    assert len(moee.info["layers"]) >= 2
    return moee


@pytest.mark.parametrize("method", [KMEANS, STATIC], ids=["experts", "static"])
@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_torchvision_to_a_verified_export(place, name, method, reduced):
    """Preprocessing is that of torchvision's own weights, by value."""
    moee = chain([f"torchvision:{name}", *TINY], method, place)
    assert moee.spec.library == "torchvision" and moee.classes == ("cat", "dog")
    assert moee.info["stages"]["extracted"]["retention"]["token_cosine"] is not None
    image = Image.open(next((place / "images").rglob("*.png"))).resize((300, 340))
    weights = torchvision.models.get_model_weights(name).DEFAULT
    full = model_transform(build_model(from_torchvision.named(f"torchvision:{name}", {}).spec))
    torch.testing.assert_close(evaluation(full)(image), weights.transforms()(image))


@pytest.fixture
def reduced(monkeypatch):
    """torchvision's builders fix the shapes of their models: here they are small ones."""
    small = {
        "vit_b_16": lambda image_size=224, **kwargs: torchvision.models.VisionTransformer(
            image_size=image_size, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, **kwargs),
        "swin_t": lambda **kwargs: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [2, 2], **kwargs),
    }  # fmt: skip
    monkeypatch.setattr(from_torchvision, "get_model_builder", small.__getitem__)


@pytest.mark.parametrize("name", HF)
def test_transformers_to_a_verified_export(place, name, capsys):
    net = HF[name](place / "hf")
    moee = chain(["hf:hf"], KMEANS if name in ("vit", "clip") else STATIC, place)
    said = capsys.readouterr().out
    assert ("its vision tower is taken" in said) == (name in ("clip", "siglip"))
    assert ("has no preprocessor_config.json" in said) == (name != "vit")
    images = torch.randn(2, *model_transform(moee.model).shape)
    with torch.no_grad():
        output = moee.dense()(images)
        if name in ("clip", "siglip"):
            features = net.get_image_features(images)
            expected = features if isinstance(features, torch.Tensor) else features.pooler_output
        else:
            found = net(images)
            expected = found.logits if name == "vit" else found.pooler_output
    torch.testing.assert_close(output, expected)


def test_a_function_to_a_verified_export(place, capsys):
    word = ["--model", "mymodels:mine"]
    moee = chain(["mymodels:mine"], KMEANS, place, word)
    said = capsys.readouterr().out
    assert "ImageNet's are taken, a guess" in said and "`fc` is its last layer" in said
    assert moee.spec.pretrained and moee.spec.weights_sha256 is not None
    assert run("finetune", "extracted", *word, "--epochs", 1, "--out", "tuned") == 0
    assert run("inspect", "tuned", *word) == 0
    assert run("bench", "exported", *word, "--runs", 2, "--duration", 0, "--throughput", 0, "--batch", 2) == 0
