"""Models of torchvision, of transformers' folders and of the user's own on the command line: from images to a verified export."""

import json
import sys
import textwrap

import numpy as np
import onnx_ir as ir
import pytest
import timm.data
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from exporter.graph.trace import to_onnx
from exporter.pretrained import ModelOptions, layout_of, resolve
from exporter.report.commands import _extract
from exporter.runners import OnnxRunner
from moee.artifacts import checkpoint
from moee.data import sources
from moee.data.transform import evaluation, model_transform
from moee.errors import MissingDependency, UserError
from moee.interface.spec import ModelSpec
from moee.libraries import from_torchvision, from_transformers
from moee.libraries.transformers_classes import ARCHITECTURES
from moee.libraries.transformers_input import read_input
from moee.models.model import build_model, load_model
from tests.exporter.command import run

transformers = pytest.importorskip("transformers")
KMEANS = ["--clusters", "2", "--cluster-tokens", "200", "--tokens", "400", "--keep", "0.9"]
STATIC = ["--preset", "static", "--keep", "0.7", "--tokens", "400"]
TINY = ["--random-weights", "0", "--img-size", "32", "--num-classes", "2"]
SMALL_VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
CODE = """
    import torch
    import torch.nn.utils.prune
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

    def compiled():
        return torch.compile(Mine())

    def quantised():
        return torch.ao.quantization.quantize_dynamic(Mine(), {nn.Linear}, dtype=torch.qint8)

    def pruned():
        model = Mine()
        torch.nn.utils.prune.l1_unstructured(model.fc, "weight", 0.5)
        return model

    SHARED = Mine()

    def shared():
        return SHARED

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.image_size = SHARED, 32

        def forward(self, x):
            return self.body(x)

    def traced():
        return torch.jit.trace(Mine(), torch.zeros(1, 3, 32, 32))

    def sizeless():
        return Mine(image_size=None)

    constant = 3
"""


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


def hf_folder(path, kind, config, processor=None):
    torch.manual_seed(0)
    net = getattr(transformers, kind)(config)
    transformers.utils.logging.disable_progress_bar()
    net.save_pretrained(path)
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


@pytest.mark.parametrize("name, method", [
    ("vit_b_16", KMEANS), pytest.param("swin_t", STATIC, marks=pytest.mark.slow),
    pytest.param("vit_b_16", STATIC, marks=pytest.mark.slow),
    pytest.param("swin_t", KMEANS, marks=pytest.mark.slow), ("convnext_tiny", STATIC),
], ids=lambda value: value if isinstance(value, str) else "static" if value is STATIC else "experts")  # fmt: skip
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
        "convnext_tiny": lambda **kwargs: torchvision.models.ConvNeXt(
            [torchvision.models.convnext.CNBlockConfig(16, 24, 1), torchvision.models.convnext.CNBlockConfig(24, None, 1)],
            **kwargs),
        "swin_t": lambda **kwargs: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [2, 2], **kwargs),
    }  # fmt: skip
    monkeypatch.setattr(from_torchvision, "get_model_builder", small.__getitem__)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("dinov2", "clip"))) for n in HF])
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


MORE = {
    "beit": ("BeitForImageClassification", small("Beit", use_relative_position_bias=True)),
    "deit": ("DeiTForImageClassificationWithTeacher", small("DeiT")), "dinov3": ("DINOv3ViTModel", small("DINOv3ViT")),
    "swin": ("SwinForImageClassification", transformers.SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2, image_size=32, patch_size=4)),
    "clip": ("CLIPForImageClassification", clip(num_labels=2)), "siglip": ("SiglipForImageClassification", siglip(num_labels=2)),
    "convnext": ("ConvNextForImageClassification", transformers.ConvNextConfig(
        hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, image_size=32)),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_laying_out_and_tracing_leave_nothing_behind(place, name):
    """transformers keeps tensors in caches of functions, BEiT its relative positions: one that was made without memory, or while
    the graph was traced, must not be used in a later run. The graph gives what the folder's own model gives."""
    net = hf_folder(place / "hf", *MORE[name], SQUASH)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model = load_model(resolve("hf:hf"))
        first = model(images)  # before the folder's model fills the caches
        found = net(images)
        expected = found.logits if hasattr(found, "logits") else found.pooler_output
        torch.testing.assert_close(first, expected)
        graph = to_onnx(model, (3, 32, 32))
        torch.testing.assert_close(model(images), expected)
    ir.save(graph, place / "graph.onnx")
    with OnnxRunner(place / "graph.onnx") as runner:
        torch.testing.assert_close(torch.from_numpy(runner.run(images.numpy())[0]), expected, atol=1e-5, rtol=1e-4)


def test_a_function_to_a_verified_export(place, capsys):
    word = ["--model", "mymodels:mine"]
    moee = chain(["mymodels:mine"], KMEANS, place, word)
    said = capsys.readouterr().out
    assert "guessed: mean 0.485" in said and "`fc` is its last layer" in said
    assert moee.spec.pretrained and moee.spec.weights_sha256 is not None
    assert run("finetune", "extracted", *word, "--epochs", 1, "--out", "tuned") == 0
    assert run("inspect", "tuned", *word) == 0
    assert run("bench", "exported", *word, "--runs", 2, "--duration", 0, "--throughput", 0, "--batch", 2) == 0


@pytest.mark.parametrize("name", ["mymodels:shared", "mymodels:Around"])
def test_a_function_may_give_the_same_module_at_each_call(place, name):
    """One is cut and the other is what it is held against."""
    assert run("extract", name, "--data", "images", *STATIC, "--no-trial-export", "--out", "extracted") == 0
    dense, moee = (checkpoint.load("extracted", name) for _ in range(2))
    own = build_model(moee.spec)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(own(images), moee.model(images)) and torch.equal(dense.model(images), moee.model(images))
        torch.testing.assert_close(own(images), sys.modules["mymodels"].SHARED(images), rtol=0, atol=0)


CONSTANTS = """
import torch
from mymodels import mine

MEAN = torch.full((1, 3, 1, 1), 0.5)


def centred():
    model = mine()
    model.register_buffer("mean", MEAN.clone(), persistent=False)
    model.register_forward_pre_hook(lambda module, args: (args[0] - module.mean,))
    return model
"""


def test_constants_of_a_functions_module_have_memory(place):
    """Even where only the shapes of a model are asked for when its module is imported."""
    (place / "constants.py").write_text(CONSTANTS)
    assert run("extract", "constants:centred", "--data", "images", *STATIC, "--out", "extracted") == 0
    for name in ("constants", "mymodels"):
        sys.modules.pop(name, None)
    assert run("inspect", "extracted", "--model", "constants:centred") == 0
    assert run("finetune", "extracted", "--model", "constants:centred", "--epochs", 1, "--out", "tuned") == 0


def test_what_a_function_compiled_is_taken_plain(place, caplog):
    caplog.set_level("INFO", "moee")
    assert run("extract", "mymodels:compiled", "--data", "images", *STATIC, "--out", "extracted") == 0
    assert caplog.text.count("was compiled (torch.compile)") == 1
    moee = checkpoint.load("extracted", "mymodels:compiled")
    assert not any("_orig_mod" in name for name in moee.model.state_dict())


@pytest.mark.parametrize("words, says", [
    (["torchvision:vit_b_17"], "no classification model 'vit_b_17'; did you mean vit_b_16"),
    (["torchvision:vit_b_16"], "give --pretrained for torchvision's, --checkpoint FILE"),
    (["torchvision:vit_b_16", "--random-weights", 0, "--model-kwargs", "weights=DEFAULT"], "it would open files"),
    (["torchvision:vit_b_16", "--random-weights", 0, "--model-kwargs", "width=3"], "unexpected keyword argument 'width'"),
    (["torchvision:vit_b_16", "--random-weights", 0, "--img-size", 100], "Input shape indivisible by patch size"),
    (["torchvision:vit_b_16", "--random-weights", 0, "--img-size", 32, 64], "takes square images"),
    (["torchvision:fasterrcnn_resnet50_fpn", "--random-weights", 0], "no classification model"),
    (["hf:nowhere"], "nowhere/config.json not found; hf: expects a local folder"),
    (["hf:vit", "--img-size", 36, "--random-weights", 0], "patches of 8 x 8 pixels"),
    (["hf:vit", "--pretrained"], "brings its weights; leave it out"),
    (["hf:vit", "--model-kwargs", "auto_map=x"], "has no argument 'auto_map'"),
    (["hf:vit", "--num-classes", 5], "has 2 classes, --num-classes says 5"),
    (["nosuch.module:f"], "there is no module nosuch in Python's path or in the current folder"),
    (["mymodels:mime"], "mymodels has no mime; did you mean mine"),
    (["mymodels:needs"], "missing a required argument: 'width'; give --model-kwargs width=VALUE"),
    (["mymodels:mine", "--model-kwargs", "depth=3"], "mymodels:mine raised TypeError"),
    (["mymodels:nothing"], "mymodels:nothing returned a dict; expected a torch.nn.Module"),
    (["mymodels:raises"], "mymodels:raises raised RuntimeError: no such file second line"),
    (["mymodels:constant"], "mymodels:constant is a int; expected a function or class"),
    (["mymodels:sizeless"], "does not say which size of images it takes: give --img-size"),
    (["mymodels:changing"], "returns are not those that the artifact was made from, or other ones at every call"),
    (["mymodels:quantised"], "mymodels:quantised returned is quantised"),
    (["mymodels:pruned"], "`fc` of the model that mymodels:pruned returned has weights that a hook computes (pruning): remove"),
    (["mymodels:traced"], "mymodels:traced returned is TorchScript"),
    (["mymodels:mine", "--img-size", 36], "patches of 8 x 8 pixels"),
    (["mymodels:Mine", "--num-classes", 3], "gives 2 outputs, --num-classes says 3"),
    (["broken:f"], "importing broken failed (SystemExit: 3)"),
])  # fmt: skip
def test_what_is_refused_in_one_sentence_before_any_work(place, words, says, capsys):
    HF["vit"](place / "vit")
    (place / "broken.py").write_text("import sys\nsys.exit(3)\n")
    assert run("extract", *words, "--data", "images", "--out", "out") == 2
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1 and not (place / "out").exists()


@pytest.mark.parametrize("change, says", [
    ({"config.json": "[]"}, "holds no JSON object"), ({"config.json": "{"}, "not readable JSON"),
    ({"config.json": '{"architectures": ["LlamaForCausalLM"]}'}, "asks for 'LlamaForCausalLM'; known are ViT"),
    ({"config.json": '{"architectures": ["os.system"]}'}, "asks for 'os.system'"),
    ({"config.json": '{"model_type": "vit", "hidden_size": "wide"}'}, "hidden_size"),
    ({"config.json": '{"model_type": "vit", "num_hidden_layers": 100000}'}, "num_hidden_layers"),
    ({"preprocessor_config.json": '{"image_mean": [0.5], "image_std": [0], "size": 32}'}, "does not say how images are resized"),
    ({"preprocessor_config.json": '{"rescale_factor": 1, "size": 32}'}, "scales pixels by 1 and not to 0..1"),
    ({"preprocessor_config.json": '{"do_rescale": false, "rescale_factor": 0.00392156862745098, "size": 32}'},
     "leaves pixels at 0..255 (do_rescale is false)"),
    ({"preprocessor_config.json": '{"size": {"height": 40, "width": 48}, "crop_size": 32, "do_center_crop": true}'},
     "cuts 32 x 32 pixels out of 40 x 48, which is no share of both sides; give the model as package.module:function"),
    ({"preprocessor_config.json": '{"resample": 77, "size": {"longest_edge": 3}}'}, "does not say how images are resized"),
    ({"model.safetensors": "no weights"}, "not valid safetensors"),
])  # fmt: skip
def test_folders_that_are_none_of_a_model(place, change, says, capsys):
    HF["vit"](place / "vit")
    for name, text in change.items():
        (place / "vit" / name).write_text(text)
    assert run("extract", "hf:vit", "--data", "images", "--out", "out") == 2
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1, error


def test_without_transformers_the_extra_is_named(place, monkeypatch, capsys):
    HF["vit"](place / "vit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("inspect", "hf:vit") == 3
    assert "pip install 'moee[hf]'" in capsys.readouterr().err


FORGED = [("python", "effects:make"), ("python", "os:system"), ("hf", "os:system"), ("torchvision", "effects:make"),
          ("timm", "effects:make")]  # fmt: skip


def test_a_manifest_imports_nothing(place, capsys, monkeypatch):
    """What a module does when it is imported, or called, must not happen because a file names it."""
    monkeypatch.setattr("os.system", lambda *words: (place / "marker").touch())
    HF["vit"](place / "vit")
    assert run("extract", "hf:vit", "--data", "images", *STATIC, "--out", "extracted") == 0
    assert run("export", "extracted", "--out", "exported") == 0
    (place / "effects.py").write_text("from pathlib import Path\nPath('marker').touch()\nmake = Path\n")
    for library, name in FORGED:
        for folder, file in (("extracted", "moee.json"), ("exported", "export.json")):
            body = json.loads((place / folder / file).read_text())
            body["model"] |= {"library": library, "name": name, "timm_name": name, "kwargs": {}, "weights": None, "config": None,
                              "part": None, "weights_sha256": None, "pretrained": True}  # fmt: skip
            (place / folder / file).write_text(json.dumps(body))
        _refused_everywhere(library, name, capsys)
        assert "effects" not in sys.modules and not (place / "marker").exists(), (library, name)


def _refused_everywhere(library, name, capsys):
    capsys.readouterr()
    for words in (
        ["finetune", "extracted", "--out", "o"], ["export", "extracted", "--out", "o"], ["inspect", "extracted"],
        ["plots", "extracted", "--out", "o"], ["verify", "exported"], ["bench", "exported"], ["bundle", "exported", "--sm", 87,
        "--out", "o"], ["bench-dispatch", "extracted"],
    ):  # fmt: skip
        code = run(*words)
        error = capsys.readouterr().err
        assert code == 2 and len(error.strip().splitlines()) == 1, (words, error)
        assert library != "python" or f"--model {name}" in error, (words, error)
    run("report", "extracted", "--out", "r.html", "--force")


def test_the_word_is_checked(place, capsys):
    """Only for functions; the weights of the function that is named must be the artifact's."""
    assert run("extract", "mymodels:mine", "--data", "images", *STATIC, "--out", "extracted") == 0
    assert run("export", "extracted", "--model", "mymodels:Mine", "--out", "a") == 0  # the same weights by another name
    capsys.readouterr()
    (place / "mymodels.py").write_text((place / "mymodels.py").read_text().replace("seed=0", "seed=1"))
    del sys.modules["mymodels"]
    assert run("export", "extracted", "--model", "mymodels:mine", "--out", "b") == 2
    assert "weights that mymodels:mine returns are not those" in capsys.readouterr().err
    assert run("inspect", "extracted", "--model", "not a function") == 2
    assert "expected package.module:function" in capsys.readouterr().err
    HF["vit"](place / "vit")
    assert run("inspect", "hf:vit", "--model", "mymodels:mine") == 2
    capsys.readouterr()
    body = ModelSpec(name="a:b", timm_name="a:b", library="python", pretrained=True)
    with pytest.raises(UserError, match="say with --model a:b that it is yours"):
        build_model(ModelSpec.model_validate_json(body.with_word("a:b").model_dump_json()))
    with pytest.raises(ValueError):
        ModelSpec.model_validate({**body.model_dump(), "_named_by_user": True})


def test_a_checkpoint_for_a_torchvision_model(place, reduced, monkeypatch):
    """torchvision's files name an MLP's maps linear_1 and linear_2, and were made at another size; a trainer adds a prefix."""
    torch.manual_seed(1)
    net = from_torchvision.get_model_builder("vit_b_16")(image_size=64, num_classes=4)
    state = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in net.state_dict().items()}
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}}, "w.pth")
    said = []
    spec = resolve("torchvision:vit_b_16", options=ModelOptions(checkpoint="w.pth", img_size=[64]), say=said.append)
    model = load_model(spec)
    assert "prefix module. removed" in said[0] and "4 classes, as the classifier of w.pth has" in said
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), net.eval()(images))
    small = load_model(resolve("torchvision:vit_b_16", options=ModelOptions(checkpoint="w.pth", img_size=[32])))
    assert small.net.encoder.pos_embedding.shape == (1, 17, 32)
    with pytest.raises(UserError, match="torchvision:vit_b_16 has 1000: add --num-classes 4|has 4 classes, --num-classes says 3"):
        resolve("torchvision:vit_b_16", options=ModelOptions(checkpoint="w.pth", img_size=[64], num_classes=3))
    features = resolve("torchvision:vit_b_16", options=ModelOptions(checkpoint="w.pth", img_size=[64], num_classes=0))
    assert load_model(features)(images).shape == (2, 32)
    # torchvision's own weights, from its cache alone
    monkeypatch.setenv("TORCH_HOME", str(place / "cache"))
    monkeypatch.setattr(from_torchvision, "host_reachable", lambda address: False)
    with pytest.raises(MissingDependency, match=r"could not be fetched and are not in the cache; .* `curl -LO https://"):
        resolve("torchvision:vit_b_16", options=ModelOptions(pretrained=True))
    big = from_torchvision.get_model_builder("vit_b_16")(image_size=224)
    file = place / "cache" / "hub" / "checkpoints" / "vit_b_16-c867db91.pth"
    file.parent.mkdir(parents=True)
    torch.save(big.state_dict(), file)
    pretrained = resolve("torchvision:vit_b_16", options=ModelOptions(pretrained=True))
    assert torch.equal(load_model(pretrained).net.heads.head.weight, big.heads.head.weight)
    assert pretrained.weights_sha256 is not None
    torch.save({n: t + 1 for n, t in big.state_dict().items()}, file)
    with pytest.raises(UserError, match="torchvision's pretrained weights of vit_b_16 are not those"):
        load_model(pretrained)


def test_every_form_of_a_folders_weights(place):
    net = HF["vit"](place / "vit")
    images = torch.randn(2, 3, 32, 32)
    expected = net(images).logits
    net.save_pretrained(place / "shards", max_shard_size="20KB")
    assert (place / "shards" / "model.safetensors.index.json").is_file()
    torch.save(load_file(place / "vit" / "model.safetensors"), place / "pytorch_model.bin")
    save_file({n: t.half() for n, t in net.state_dict().items()}, place / "half.safetensors")  # today's names
    for source in (["hf:shards", {}], ["hf:bin", {}], ["hf:vit", {"checkpoint": str(place / "half.safetensors")}]):
        if source[0] == "hf:bin":
            (place / "bin").mkdir()
            (place / "bin" / "config.json").write_bytes((place / "vit" / "config.json").read_bytes())
            (place / "pytorch_model.bin").rename(place / "bin" / "pytorch_model.bin")
        spec = resolve(source[0], options=ModelOptions(**source[1]))
        with torch.no_grad():
            torch.testing.assert_close(load_model(spec)(images), expected, atol=1e-3, rtol=1e-3)
    spec = resolve("hf:shards")
    shard = next((place / "shards").glob("model-0*"))
    save_file({n: t + 1 for n, t in load_file(shard).items()}, shard)
    with pytest.raises(UserError, match="have changed since the artifact was made"):
        load_model(spec)
    shard.unlink()
    with pytest.raises(UserError, match="names the shard .* which is not beside it"):
        resolve("hf:shards")
    index = place / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../vit/model.safetensors"}}))
    with pytest.raises(UserError, match="expected files of its own folder"):
        resolve("hf:shards")


def test_names_of_classes_come_from_the_model(place):
    """id2label numbers folders of the same names; a folder of another name has no label, and that is said."""
    labels = {0: "dog", 1: "cat"}
    config = small("ViT", id2label=labels, label2id={"dog": 0, "cat": 1})
    hf_folder(place / "vit", "ViTForImageClassification", config, SQUASH)
    assert run("extract", "hf:vit", "--data", "images", *STATIC, "--out", "extracted") == 0
    moee = checkpoint.load("extracted")
    assert moee.classes == ("dog", "cat") == moee.spec.labels
    (place / "images" / "train" / "cat").rename(place / "images" / "train" / "bird")
    (place / "images" / "val" / "cat").rename(place / "images" / "val" / "bird")
    train, _ = sources.load_splits("images", moee.record.transform, 0, None, 2, labels=moee.spec.labels)
    assert train.classes == ("dog", "cat") and set(train.labels) == {0, -1}
    assert any("'bird' is none of the model's 2 classes" in note for note in train.notes)


PROCESSORS = {
    "ViTImageProcessor": {}, "BitImageProcessor": {"size": {"shortest_edge": 256}, "crop_size": 224},
    "CLIPImageProcessor": {}, "SiglipImageProcessor": {"size": {"height": 224, "width": 224}},
    "DeiTImageProcessor": {}, "BeitImageProcessor": {"size": {"height": 256, "width": 256}, "do_center_crop": True},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 224}},
}  # fmt: skip
UNEVEN = {  # sizes that divide into nothing; a ConvNeXt's 32 / 0.875 is 36.57 and ends at 36
    "ConvNextImageProcessor": [
        {"size": {"shortest_edge": edge}, "crop_pct": share} for edge, share in ((32, 0.875), (30, 0.88), (33, 0.95), (47, 0.7))
    ],
    "BitImageProcessor": [{"size": {"shortest_edge": edge}, "crop_size": crop} for edge, crop in ((37, 32), (43, 33), (58, 50))],
    "CLIPImageProcessor": [{"size": {"shortest_edge": 41}, "crop_size": {"height": 35, "width": 35}}],
    "BeitImageProcessor": [{"size": {"height": 37, "width": 37}, "crop_size": {"height": 31, "width": 31}}],
    "ViTImageProcessor": [{"size": {"height": 33, "width": 33}}],
}  # fmt: skip


@pytest.mark.parametrize(
    "name, size, options",
    [
        *((name, 224, options) for name, options in PROCESSORS.items()),
        *((name, 32, options) for name, each in UNEVEN.items() for options in each),
    ],
)
def test_images_are_prepared_as_transformers_does(place, name, size, options):
    HF["vit"](place / "vit")
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    processor = kind(**options)
    processor.save_pretrained(place / "vit")
    spec = from_transformers.named("hf:vit", {"image_size": size}).spec
    if size == 224:
        prepare = evaluation(model_transform(build_model(spec)))
    else:  # no patches divide these
        prepare = timm.data.create_transform(**spec.input.model_dump(exclude={"fixed_input_size"}), is_training=False)
    sizes = ((300, 340), (75, 33), (50, 61)) if size == 224 else ((64, 64), (37, 37), (301, 301))
    for rows, columns in sizes:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (rows, columns, 3), dtype=np.uint8))
        expected = torch.as_tensor(np.array(processor(image, return_tensors="np")["pixel_values"][0]))
        made = prepare(image)
        assert made.shape == expected.shape
        assert (made - expected).abs().max() < 0.03, "one level of 255, divided by the deviation"


def test_plans_and_printed_commands_know_the_library(place):
    spec = resolve("mymodels:Mine", options=ModelOptions(num_classes=2))
    assert spec.outputs == 2 and spec.kwargs == {}
    other = spec.model_copy(update={"library": "torchvision"})
    assert spec.identity() != other.identity()
    body = {"model": spec.model_dump(mode="json"), "data": "images", "info": {}}
    line = _extract(body)[-1]
    assert line.startswith("moee extract mymodels:Mine --data images --num-classes 2") and "--pretrained" not in line
    HF["vit"](place / "vit")
    line = _extract({"model": resolve("hf:vit").model_dump(mode="json"), "data": "images", "info": {}})[-1]
    assert line == f"moee extract hf:{place / 'vit'} --data images --out extracted"
    old = {"name": "x", "timm_name": "vit_tiny_patch16_224", "kwargs": {}}
    assert ModelSpec.model_validate(old).library == "timm" and "library" not in ModelSpec.model_validate(old).identity()
    assert layout_of("mymodels:mine", ModelOptions(img_size=[32])).input_size == (32, 32)


def test_a_processor_with_a_mean_alone_has_that_mean(tmp_path):
    """Without the deviation beside it the mean was left out too, and only the deviation was said to be guessed."""
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "size": 32, "resample": 2}')
    found, notes = read_input(tmp_path, ARCHITECTURES["ViTModel"], {"image_size": 32})
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5)) and "lacks image_std: guessed" in notes[0]
