"""The Python interface on modules of other libraries and of one's own, from a loader to a verified export."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.utils.prune
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import exporter
import moee
from exporter import cli
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.libraries.adapt import adapt
from moee.models.model import load_model as load_spec
from moee.stages.opened import session_of, spec_of

ROOT = Path(__file__).parents[2]
QUICK = {"preset": "static", "keep": 0.7, "tokens": 400, "refit_tokens": 400}


def images(count=24, size=32, classes=3, seed=0):
    """Noise with a bright quarter that tells the class."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, size, size, generator=generator) * 0.1
    labels = torch.arange(count) % classes
    for i, label in enumerate(labels.tolist()):
        pixels[i, :, : size // 2, label * size // classes : (label + 1) * size // classes] += 2
    return TensorDataset(pixels, labels)


def torchvision_vit():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=3)
    nn.init.normal_(model.heads.head.weight)  # torchvision's is zero
    return model


class Stranger(nn.Module):
    """A user's own encoder, whose outputs are features."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 32, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.image_size = 32

    def forward(self, x):
        x = self.cut(x).flatten(2).transpose(1, 2)
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return x.mean(1)


@pytest.fixture(scope="module")
def data():
    return images(), images(12, seed=1)


def test_a_torchvision_model_comes_to_a_verified_export(data, tmp_path):
    train, val = data
    model = torchvision_vit().train()
    before = copy.deepcopy(model.state_dict())
    result = moee.extract(model, DataLoader(train, batch_size=5, shuffle=True), DataLoader(val, batch_size=4), **QUICK)
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items()), "it stays as it is"
    assert result.info["stages"]["extracted"]["retention"]["images"] == 12
    again = moee.extract(model, train, val, **QUICK)
    assert all(torch.equal(t, again.model.state_dict()[name]) for name, t in result.model.state_dict().items())

    tuned = moee.finetune(result, train, val, epochs=1, lr=1e-4, batch_size=8)
    assert "tuned" in tuned.info["stages"] and "tuned" not in result.info["stages"], "a copy"
    found = moee.evaluate(tuned, val)
    assert found.images == 12 and found.class_cosine > 0.9
    moee.save(tuned, tmp_path / "model")
    with pytest.raises(UserError, match="model=MODULE"):
        moee.load(tmp_path / "model")
    other = torchvision_vit()
    other.heads.head.bias.data += 1
    with pytest.raises(UserError, match="not those that the artifact was made from"):
        moee.load(tmp_path / "model", other)
    opened = moee.load(tmp_path / "model", model)
    with pytest.raises(UserError, match="given in Python"):
        moee.evaluate(opened)
    exporter.export(opened, tmp_path / "export")
    assert exporter.verify(tmp_path / "export", opened, DataLoader(val, batch_size=4), sizes=(1, 2))
    timed = exporter.bench(tmp_path / "export", val, model=opened, batch=2, runs=2, duration_s=0, throughput_s=0)
    assert timed.speedup > 0


def test_a_module_of_ones_own_is_cut_by_its_experts_and_verified(data, tmp_path):
    train, val = data
    options = {"clustering": "kmeans", "clusters": 2, "components": 4, "keep": 0.8, "tokens": 400, "cluster_tokens": 200}
    result = moee.extract(Stranger(), train, val, num_classes=0, **options)
    assert result.probe is not None and result.info["layers"]
    exporter.export(result, tmp_path / "export", precision="fp16")
    assert exporter.verify(tmp_path / "export", result, val, sizes=(2,))


def test_commands_on_an_export_that_only_python_can_give_a_model_say_so(data, tmp_path, capsys):
    result = moee.extract(torchvision_vit(), *data, **QUICK)
    folder, out = str(tmp_path / "export"), str(tmp_path / "out")
    exporter.export(result, folder)
    capsys.readouterr()
    calls = {
        "exporter.verify(": ["verify", folder], "exporter.bundle(": ["bundle", folder, "--sm", "87", "--out", out],
        "exporter.bench(": ["bench", folder, "--data", "digits"],
    }  # fmt: skip
    for call, line in calls.items():
        assert cli.main(line) == 2
        said = capsys.readouterr().err
        assert "only Python can give" in said and call in said and "--model" not in said, said
    assert cli.main(["bench", folder, "--runs", "2", "--duration", "0", "--throughput", "0"]) == 0
    assert "on noise: its model is a module in Python" in capsys.readouterr().out


def test_a_model_by_its_name_goes_on_at_the_command_line(data, tmp_path, capsys):
    model = moee.load_model("test_vit", random_weights=3, num_classes=3, img_size=32)
    train, val = data
    moee.extract(model, train, val, **QUICK, out=tmp_path / "named")
    body = json.loads((tmp_path / "named" / "moee.json").read_text())
    assert body["model"]["random_seed"] == 3 and body["model"]["library"] == "timm"
    assert cli.main(["export", str(tmp_path / "named"), "--out", str(tmp_path / "export")]) == 0
    assert exporter.verify(tmp_path / "export", moee.load(tmp_path / "named"), val, sizes=(2,))
    with pytest.raises(UserError, match="exists"):
        moee.save(moee.load(tmp_path / "named"), tmp_path / "named")

    with torch.no_grad():
        model.head.bias += 1  # the user tunes it: the name no longer says which model it is
    changed = moee.extract(model, train, val, **QUICK, out=tmp_path / "changed")
    assert changed.spec.library == "module"
    assert cli.main(["export", str(tmp_path / "changed"), "--out", str(tmp_path / "other")]) == 2
    assert "made from a module in Python" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, t: moee.extract(7, t), "the model is a int"),
        (lambda m, t: moee.extract(m, t, keep=2), "keep: expected a share"),
        (lambda m, t: moee.extract(m, t, kep=0.9), "kep"),
        (lambda m, t: moee.extract(m, images(8, size=40)), "images of 3 x 40 x 40"),
        (lambda m, t: moee.extract(m, t, t), "are the training images"),
        (lambda m, t: moee.extract(m, "digits", t), "held-out images go with"),
        (lambda m, t: moee.extract(m, t, method="clear-moe", preset="static"), "clear-moe"),
        (lambda m, t: moee.load_model("vit_nothing", pretrained=True), "unknown model"),
        (lambda m, t: moee.load_model("test_vit"), "has no weights yet"),
        (lambda m, t: moee.load_model("test_vit"), "pretrained=True for timm's, checkpoint=FILE for yours, or random_weights="),
        (lambda m, t: moee.extract(m, t, device="tpu"), "tpu"),
        (lambda m, t: moee.extract(m, t, jobs=1.5), "jobs: expected a whole number"),
        (lambda m, t: moee.extract(nn.Sequential(m), iter(())), "give input={'input_size': (channels, height, width)}"),
        (lambda m, t: moee.extract(m, t, input={"std": (0, 1, 1)}), "std of input="),
        (lambda m, t: moee.extract(m, t, keep="0.5"), "keep: expected a number above 0 and at most 1, such as 0.9 (came '0.5')"),
        (lambda m, t: moee.extract(m, t, recipe={"steps": []}), "recipe came as {'steps': []}; expected the path"),
        (lambda m, t: moee.extract(m, t, recipe=" "), "recipe came as ' '; expected the path"),
        (lambda m, t: moee.extract(m, t, recipe="r.toml", keep=0.5), "leave keep out"),
        (lambda m, t: moee.extract(m, t, classes=["a", "a", "b"]), "expected a list of names that differ"),
        (lambda m, t: moee.extract(m, t, classes="abc"), "expected a list of names that differ"),
        (lambda m, t: moee.extract(m, t, method="clear-moe", collages=2), "is for method experts"),
        (lambda m, t: moee.extract(m, t, method="experts", experts=3), "and not for experts; give clusters in its place"),
        (lambda m, t: moee.extract(m, t, method="moefication", clusters=3), "for moefication; give experts in its place"),
        (lambda m, t: exporter.bundle("nowhere", "b", sm=87, batch=(1, 2)), "batch: expected the smallest"),
        (lambda m, t: exporter.bench("nowhere", t, batch=8.0), "batch: expected a whole number"),
        (lambda m, t: exporter.bench("nowhere", t, streams=0), "streams: expected a whole number"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_the_work(call, said):
    with pytest.raises(UserError, match=re.escape(said)):
        call(torchvision_vit(), images(8))


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"max_drop": 101}, "max_drop"), ({"max_drop": float("inf")}, "max_drop"), ({"max_drop": float("nan")}, "max_drop"),
        ({"max_drop": True}, "max_drop"), ({"max_drop": -1}, "max_drop"), ({"max_drop": "2"}, "max_drop"),
        ({"images": -5}, "images"), ({"images": 3.5}, "images"), ({"images": True}, "images"),
        ({"min_route_agreement": -1}, "min_route_agreement"),
        ({"sizes": ()}, "sizes"), ({"sizes": (0,)}, "sizes"), ({"sizes": (2.5,)}, "sizes"),
    ],
)  # fmt: skip
def test_a_gate_that_could_not_fail_is_refused_before_the_work(gate, said):
    with pytest.raises(UserError, match=f"{said}: expected"):
        exporter.verify("nowhere", None, None, **gate)  # neither the export nor the model is looked at


def test_calibration_is_for_int8_alone():
    for given in ({"calibration": images(4)}, {"calibration_images": 8}):
        with pytest.raises(UserError, match="calibration_images and calibration are for int8; precision fp32 is not"):
            exporter.export(None, "nowhere", **given)


def test_importing_the_packages_loads_no_torch():
    code = """
import sys, moee, exporter
assert callable(moee.progress.silent) and issubclass(moee.errors.UserError, ValueError)
assert "torch" not in sys.modules and "onnx" not in sys.modules
assert all(map(callable, (moee.extract, moee.evaluate, moee.finetune, exporter.verify, exporter.bundle)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_the_caller_has_set_in_torch_touches_no_figure(data):
    def figures():
        result = moee.extract(torchvision_vit(), *data, report=moee.progress.silent, **QUICK)
        kept = moee.evaluate(result, data[1], report=moee.progress.silent)
        return {**result.model.state_dict(), "cosine": torch.tensor(kept.class_cosine, dtype=torch.float64)}

    plain = figures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = figures()
        assert torch.is_autocast_enabled("cpu")
    try:
        made = torchvision_vit()
        torch.set_default_dtype(torch.float64)
        result = moee.extract(made, *data, report=moee.progress.silent, **QUICK)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in under_autocast.items():
        assert torch.equal(plain[name], value), name
    assert all(torch.equal(plain[name], value) for name, value in result.model.state_dict().items())


def test_what_is_said_of_a_named_model_and_would_not_be_obeyed_is_refused(data):
    with pytest.raises(UserError, match="num_classes and input of a model that is named .*moee.load_model"):
        moee.extract("vit_tiny_patch16_224", *data, num_classes=7, input={"input_size": (3, 32, 32)}, **QUICK)


def test_the_interface_is_functions_whatever_was_used_before():
    for package in (moee, exporter):
        inside = {path.stem for path in Path(package.__file__).parent.iterdir()}
        assert not inside & set(package.INTERFACE), "a module of that name would take the function's place"
        assert all(callable(getattr(package, name)) for _ in range(2) for name in package.INTERFACE)


def test_a_timm_model_that_was_trained_here_needs_no_name(data):
    train, val = data
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    result = moee.extract(model, train, val, **QUICK)
    assert result.spec.library == "module" and result.dense().state_dict().keys() == model.state_dict().keys()


class Reversed(timm.models.vision_transformer.VisionTransformer):
    def forward(self, x):
        return super().forward(x).flip(-1)


def _reversed_by_a_hook(model):
    model.register_forward_hook(lambda module, args, output: output.flip(-1))


def _reversed_by_a_class(model):
    model.__class__ = Reversed


def _turned_images(model):
    model.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))


@pytest.mark.parametrize("change", [_reversed_by_a_hook, _reversed_by_a_class, _turned_images])
def test_figures_are_of_what_a_timm_model_gives_its_caller(data, change):
    """Its two halves, `forward_features` and `forward_head`, give another output."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    change(model)
    dense = session_of(model, *data).reference
    pixels = data[1].tensors[0]
    with torch.no_grad():
        assert torch.allclose(dense.features, model.eval()(pixels), atol=1e-5)
    assert dense.tokens is not None


def _relu(model):
    for block in model.blocks:
        block.mlp.act = nn.ReLU()


def _average(model):
    model.global_pool = "avg"


def _negative(model):
    model.head.register_forward_hook(lambda module, args, output: -output)


def _other_mean(model):
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}


@pytest.mark.parametrize("change", [_relu, _average, _negative, _other_mean])
def test_a_named_model_that_was_changed_without_its_weights_is_a_module_of_its_own(data, change, caplog):
    caplog.set_level("INFO", "moee")
    model = moee.load_model("test_vit", random_weights=3, num_classes=3, img_size=32)
    assert spec_of(model.train()).library == "timm" and model.training
    change(model.eval())
    result = moee.extract(model, *data, **QUICK)
    assert result.spec.library == "module" and "was changed since load_model" in caplog.text
    with torch.no_grad():
        pixels = data[1].tensors[0]
        assert torch.allclose(result.dense()(pixels), model(pixels), atol=1e-5)
    assert model_transform(result.model).mean == model.pretrained_cfg["mean"]


@pytest.mark.parametrize("make", [torchvision_vit, lambda: timm.create_model("test_vit", num_classes=3, img_size=32)])
def test_the_number_of_classes_is_what_is_told_or_refused(data, make, tmp_path):
    model = make()
    result = moee.extract(model, *data, num_classes=0, **QUICK)
    assert result.probe is not None and result.spec.outputs == 0 and result.probe.weight.shape == (3, 3)
    moee.save(result, tmp_path / "features")
    assert moee.evaluate(moee.load(tmp_path / "features", model), data[1]).labelled == 12
    assert moee.extract(model, *data, num_classes=3, **QUICK).probe is None
    with pytest.raises(UserError, match="gives 3 outputs, num_classes says 7: leave it out, or give 3 or 0"):
        moee.extract(model, *data, num_classes=7, **QUICK)


def test_what_is_known_of_an_adapted_model_may_be_told_anew():
    built = load_spec(spec_of(adapt(torchvision_vit()), 0, {"mean": (0.1, 0.2, 0.3)}))
    found = model_transform(built)
    assert built.num_classes == 0 and found.mean == (0.1, 0.2, 0.3) and found.shape == (3, 32, 32)


def quantised():
    return torch.ao.quantization.quantize_dynamic(torchvision_vit().eval(), {nn.Linear}, dtype=torch.qint8)


def pruned():
    model = Stranger()
    torch.nn.utils.prune.l1_unstructured(model.mlps[0][0], "weight", 0.5)
    return model


def without_memory():
    with torch.device("meta"):
        return Stranger()


def traced():
    return torch.jit.trace(Stranger(), torch.zeros(1, 3, 32, 32))


def within(inner):
    return nn.Sequential(inner, nn.Identity())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "said"), [(quantised, "is quantised"), (pruned, "prune.remove"), (without_memory, "meta"), (traced, "TorchScript")]
)
def test_weights_that_are_no_plain_tensors_are_refused(data, make, said):
    for model in (make(), within(make())):
        with pytest.raises(UserError, match=said):
            moee.extract(model, *data, input={"input_size": (3, 32, 32)}, **QUICK)


class Cast(Stranger):
    """A forward that chooses its precision itself."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_graphs_that_onnx_runtime_cannot_load_are_refused_by_the_export(data, tmp_path):
    result = moee.extract(Cast(), *data, num_classes=0, **QUICK)
    with pytest.raises(UserError, match="ONNX Runtime cannot load the exported dense.onnx"):
        exporter.export(result, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_compiled_model_is_the_one_that_was_compiled(data, caplog):
    caplog.set_level("INFO", "moee")
    model = torchvision_vit()
    result = moee.extract(torch.compile(model), *data, **QUICK)
    assert type(result.spec.module) is type(model) and "was compiled" in caplog.text
    part = torchvision_vit()
    part.encoder.layers[0] = torch.compile(part.encoder.layers[0])
    inside = moee.extract(part, *data, **QUICK)
    assert not any("_orig_mod" in name for name in inside.model.state_dict())
    assert hasattr(part.encoder.layers[0], "_orig_mod"), "the user's own stays as it is"
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, inside.model.state_dict()[name])


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path):
    code, after = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 32
    loaders = "train_loader, val_loader = DataLoader(train, 50), DataLoader(val, 50)\nimages = next(iter(val_loader))[0]\n"
    after = after.replace('out="runs/mine", max_drop=1', 'out="runs/mine", max_drop=5, time_s=60')
    agreed = "wanted = (model if result.part == 'dense' else cut.model)(images)\n"
    agreed += "assert (torch.from_numpy(outputs) - wanted).abs().max() < 1e-3\n"
    (tmp_path / "example.py").write_text(code + loaders + after + agreed)
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, env=found)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accuracy" in done.stdout
