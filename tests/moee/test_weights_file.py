"""Checkpoints as people have them: what is taken from them, and what is said about those that do not fit."""

import argparse
import json
import pathlib
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from moee.errors import UserError
from moee.models.model import ModelSpec, load_model
from moee.models.source import named_spec, with_file
from moee.weights.fitting import MAX_TRIED, best_fit
from moee.weights.prefixes import MAX_PREFIXES, prefixes
from moee.weights.weights_file import MAX_CONTAINERS, PICKLED, containers, read_checkpoint, refuse_not_finite

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


def model_of(classes=4, name=NAME, seed=1, **kwargs):
    """Every tensor is random: zeros and ones of one shape could be swapped unseen."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=classes, **(SMALL if name == NAME else {}), **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int32])
def test_tensors_of_an_artifact_must_be_finite(dtype):
    path = pathlib.Path("a.safetensors")
    refuse_not_finite({"w": torch.ones(3, dtype=dtype)}, path)
    if dtype != torch.int32:
        with pytest.raises(UserError, match="a.safetensors: 'w' holds numbers that are not finite"):
            refuse_not_finite({"v": torch.ones(1), "w": torch.tensor([1, float("inf")], dtype=dtype)}, path)


def test_models_of_these_tests_have_no_two_equal_tensors():
    tensors = list(model_of().state_dict().values())
    assert not any(torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])


def taken(path, name=NAME, **kwargs):
    """(model, spec, notes) of the command line's way with a checkpoint."""
    spec, _ = named_spec(name, {**(SMALL if name == NAME else {}), **kwargs})
    spec, notes = with_file(spec, path)
    return load_model(spec), spec, notes


def equal(model, state) -> bool:
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[key], state[key].float()) for key in ours)


def train_timm(folder, model, namespace):
    """`model_best.pth.tar` as timm's train.py writes it: its own saver, an averaged model, an optimiser that has stepped."""
    ema = ModelEmaV3(model, decay=0.5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.train()(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimiser.step()
    ema.update(model)
    saver = CheckpointSaver(
        model, optimiser, args=namespace, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=1
    )
    saver.save_checkpoint(3, metric=71.25)
    return folder / "model_best.pth.tar", ema.module.state_dict()


def test_what_timms_train_script_writes(tmp_path):
    """EMA before the plain weights, the Namespace is read, the number of classes is the checkpoint's."""
    arguments = argparse.Namespace(
        model=NAME, lr=5e-4, betas=[0.9, 0.999], opt_eps=None, aug_splits=0, model_kwargs={"a": (1, 2)}, amp=True, data_dir="x"
    )
    model = model_of()
    path, averaged = train_timm(tmp_path, model, arguments)
    assert isinstance(torch.load(path, weights_only=False)["args"], argparse.Namespace)
    loaded, spec, notes = taken(path)
    assert equal(loaded, averaged) and not equal(loaded, model.state_dict())
    assert spec.kwargs["num_classes"] == 4 and spec.part.container == "state_dict_ema" and len(spec.weights_sha256) == 64
    assert notes == [f"model_best.pth.tar: state_dict_ema, {len(averaged)} tensors",
                     "4 classes, as the classifier of model_best.pth.tar has",
                     "model_best.pth.tar was trained with --model-kwargs a=[1, 2], which are not given",
                     "model_best.pth.tar: its training measured an accuracy of 71.25%; if the dense model has far less here, the "
                     "classes may be numbered otherwise (--class-map)"]  # fmt: skip


@pytest.mark.parametrize(
    "wrap, container, prefix",
    [
        (lambda s: s, "", ""),
        (lambda s: {"state_dict": s, "state_dict_ema": None}, "state_dict", ""),
        (lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, "model", ""),
        (lambda s: {"model_ema": s, "model": {k: v + 1 for k, v in s.items()}}, "model_ema", ""),
        (lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s}, "model_ema", ""),
        (lambda s: {"module": s}, "module", ""),
        (lambda s: {"model": {"state_dict": s}}, "model.state_dict", ""),
        (lambda s: {"student": {k: v + 1 for k, v in s.items()}, "teacher": s}, "teacher", ""),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "", "module."),
        (lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}, "", "_orig_mod."),
        (lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, "", "module._orig_mod."),
        (lambda s: {f"encoder.{k}": v for k, v in s.items()}, "", "encoder."),
        (lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}, "epoch": 3}, "state_dict", "net."),
        (lambda s: {"state_dict": {f"model.backbone.{k}": v for k, v in s.items()}}, "state_dict", "model.backbone."),
    ],
)
def test_containers_and_prefixes(tmp_path, wrap, container, prefix):
    state = model_of().state_dict()
    torch.save(wrap(state), tmp_path / "w.ckpt")
    loaded, spec, notes = taken(tmp_path / "w.ckpt")
    assert equal(loaded, state) and (spec.part.container, spec.part.prefix) == (container, prefix)
    words = [*([container] if container else []), f"{len(state)} tensors", *([f"prefix {prefix} removed"] if prefix else [])]
    assert notes[0] == f"w.ckpt: {', '.join(words)}"


def test_averaged_weights_of_another_shape_are_not_preferred(tmp_path):
    state = model_of().state_dict()
    torch.save({"state_dict_ema": {"head.weight": torch.zeros(4, 32)}, "state_dict": state}, tmp_path / "w.pth")
    loaded, spec, _ = taken(tmp_path / "w.pth")
    assert equal(loaded, state) and spec.part.container == "state_dict"


def test_lightning(tmp_path):
    """The module's own tensors beside the network's, hyper-parameters, callbacks and optimiser states."""
    state = model_of().state_dict()
    body = {
        "epoch": 2, "global_step": 10, "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 1e-3, "betas": (0.9, 0.99)},
        "state_dict": {**{f"net.{k}": v for k, v in state.items()}, "loss.weight": torch.ones(4)}, "lr_schedulers": [],
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}],
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5), "kth_value": None}},
    }  # fmt: skip
    torch.save(body, tmp_path / "epoch=2.ckpt")
    loaded, _, notes = taken(tmp_path / "epoch=2.ckpt")
    assert equal(loaded, state) and notes[0].endswith(f"{len(state)} tensors, prefix net. removed, loss.weight left out")


def test_a_head_beside_a_backbone(tmp_path):
    """`self.backbone` and `self.head` of a module of one's own: both are the model's."""
    state = model_of().state_dict()
    torch.save({(k if k.startswith("head.") else f"backbone.{k}"): v for k, v in state.items()}, tmp_path / "w.pth")
    loaded, spec, _ = taken(tmp_path / "w.pth")
    assert equal(loaded, state) and spec.kwargs["num_classes"] == 4 and spec.part.prefix == "backbone."


@pytest.mark.parametrize("suffix", [".safetensors", *(s for s in PICKLED if s != ".tar"), ".pth.tar"])
def test_every_ending(tmp_path, suffix):
    state, path = model_of().state_dict(), tmp_path / f"w{suffix}"
    wrapped = {f"module.{k}": v for k, v in state.items()}
    save_file(wrapped, path) if suffix == ".safetensors" else torch.save(wrapped, path)
    assert equal(taken(path)[0], state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
    state = {k: v.to(dtype) for k, v in model_of().state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    loaded, _, _ = taken(tmp_path / "w.pth")
    assert equal(loaded, state) and {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_the_format_of_before_2020_is_read(tmp_path):
    state = model_of().state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert equal(taken(tmp_path / "w.pth")[0], state)


def dinov2(state):
    return {**state, "mask_token": torch.zeros(1, 32)}


def deit3(state):
    return {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in state.items()}


def dinov3(state):
    """As Meta's files have it: storage tokens, LayerScale modules, masks and periods beside the weights."""
    names = {"reg_token": "storage_tokens"}
    out = {}
    for key, value in state.items():
        key = names.get(key, key)
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        out[key] = value
    return {**out, "mask_token": torch.zeros(1, 8), "rope_embed.periods": torch.ones(4)}


def convnext(state):
    """As the authors' files have it."""
    out = {}
    for key, value in state.items():
        key = key.replace("stem.", "downsample_layers.0.").replace("head.fc.", "head.").replace("head.norm.", "norm.")
        if key.startswith("stages."):
            parts = key.split(".")
            if parts[2] == "downsample":
                key = f"downsample_layers.{parts[1]}.{'.'.join(parts[3:])}"
            else:
                key = ".".join([parts[0], parts[1], *parts[3:]])
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        out[key] = value
    return out


ORIGINALS = {
    "DeiT": (NAME, lambda s: {"model": s}, {}),
    "DeiT III": ("deit3_small_patch16_224", deit3, {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}),
    "DINOv2": ("vit_small_patch14_dinov2", dinov2, {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 56}),
    "DINOv3": ("vit_small_patch16_dinov3", dinov3, {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}),
    "Swin": ("test_swin" if timm.is_model("test_swin") else "swin_tiny_patch4_window7_224",
             lambda s: {"model": {**s, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}},
             {"embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2]}),
    "ConvNeXt": ("convnext_atto", lambda s: {"model": convnext(s)}, {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16]}),
    "OpenCLIP": (NAME, lambda s: {f"visual.trunk.{k}": v for k, v in s.items()}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", ORIGINALS)
def test_original_files_go_through_timms_filter(tmp_path, case):
    name, rename, kwargs = ORIGINALS[case]
    model = model_of(name=name, **kwargs) if case not in ("DINOv2", "DINOv3") else model_of(0, name, **kwargs)
    torch.save(rename(model.state_dict()), tmp_path / "w.pth")
    loaded, _, _ = taken(tmp_path / "w.pth", name, **kwargs)
    state, ours = model.state_dict(), loaded.state_dict()
    assert state.keys() == ours.keys() and all(torch.equal(state[key], ours[key]) for key in state)


def test_a_resized_position_embedding_is_said(tmp_path):
    """A model tuned at 64 pixels runs at 32 when nobody says otherwise: that may cost accuracy."""
    torch.manual_seed(1)
    torch.save(timm.create_model(NAME, num_classes=4, **{**SMALL, "img_size": 64}).state_dict(), tmp_path / "w.pth")
    _, _, notes = taken(tmp_path / "w.pth", img_size=32)
    assert "pos_embed resized from [1, 65, 32] to [1, 17, 32]" in notes[0]
    spec, _ = named_spec(NAME, {k: v for k, v in SMALL.items() if k != "img_size"})
    _, notes = with_file(spec, tmp_path / "w.pth")
    assert "w.pth was trained on 64 x 64 pixels; --img-size 64 keeps them" in notes


def test_without_a_classifier_features_are_compared(tmp_path):
    state = {k: v for k, v in model_of().state_dict().items() if not k.startswith("head.")}
    torch.save(state, tmp_path / "w.pth")
    loaded, spec, notes = taken(tmp_path / "w.pth")
    assert spec.kwargs["num_classes"] == 0 and loaded.num_classes == 0 and "has no classifier" in notes[1]
    with pytest.raises(UserError, match="no classifier, vit_tiny_patch16_224 has one: add --num-classes 0"):
        taken(tmp_path / "w.pth", num_classes=4)


def test_a_classifier_in_another_form_is_no_lack_of_one(tmp_path):
    """By weight_norm it is refused; under another name, or in a part of its own, it is said."""
    state = model_of().state_dict()
    backbone = {key: value for key, value in state.items() if not key.startswith("head")}
    head = state["head.weight"]
    torch.save({**backbone, "head.bias": head[:, 0], "head.weight_g": head[:, :1], "head.weight_v": head}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"weight norm in place of plain weights \(head.weight_g\): take it off"):
        taken(tmp_path / "w.pth")
    torch.save({"backbone": backbone, "classifier": {"weight": head, "bias": state["head.bias"]}}, tmp_path / "w.pth")
    assert taken(tmp_path / "w.pth")[2][1].startswith(
        "w.pth has no classifier under the model's name of it (head), and its other parts are not read (classifier): features"
    )


@pytest.mark.parametrize("beside", ["exp_avg", "optimizer.exp_avg", "grads"])
def test_what_an_optimiser_keeps_is_not_taken_for_the_weights(tmp_path, beside):
    state = model_of().state_dict()
    first, *rest = beside.split(".")
    other = {key: value + 1 for key, value in state.items()}
    torch.save({first: {rest[0]: other} if rest else other, "net": state}, tmp_path / "w.pth")
    loaded, spec, notes = taken(tmp_path / "w.pth")
    assert equal(loaded, state) and spec.part.container == "net" and any(f"fit as well: {beside}" in note for note in notes)


def test_a_classifier_on_a_model_that_has_none_by_itself(tmp_path):
    name, kwargs = "vit_small_patch14_dinov2", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 56}
    model = model_of(3, name, **kwargs)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded, spec, _ = taken(tmp_path / "w.pth", name, **kwargs)
    assert spec.kwargs["num_classes"] == 3 and torch.equal(loaded.head.weight, model.head.weight)
    loaded, spec, notes = taken(tmp_path / "w.pth", name, **kwargs, num_classes=0)
    assert loaded.num_classes == 0 and "(3 classes) is left out" in notes[1]


@pytest.mark.parametrize(
    "saved, asked, words",
    [
        (dict(classes=6), dict(num_classes=5), "has 6 classes, --num-classes says 5: leave --num-classes out or give 6"),
        (dict(in_chans=1), {}, "the file has 1 input channels, vit_tiny_patch16_224 has 3: add --in-chans 1"),
        (dict(in_chans=3), dict(in_chans=4), "the file has 3 input channels, .* has 4: add --in-chans 3"),
        (dict(depth=3), {}, "12 unexpected .blocks.2.norm1.weight, blocks.2.norm1.bias, .* and 9 more"),
        (dict(depth=1), {}, "12 tensors missing .blocks.1.norm1.weight"),
        (dict(embed_dim=48), {}, "belongs to another model; cls_token is .1, 1, 48., expected .1, 1, 32."),
        (dict(global_pool="avg"), {}, "add --model-kwargs global_pool=avg"),
        (dict(qkv_bias=False), {}, "2 tensors missing .blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias"),
    ],
)
def test_a_mismatch_says_what_differs_and_which_flag_mends_it(tmp_path, saved, asked, words):
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=saved.pop("classes", 4), **{**SMALL, **saved})
    torch.save({"state_dict": model.state_dict(), "arch": NAME}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words) as error:
        taken(tmp_path / "w.pth", **asked)
    assert str(tmp_path / "w.pth") in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "change, words",
    [
        ({"head.weight": lambda t: t.T.contiguous()},
         r"head.weight of the classifier is \[32, 4\], .* takes \[4, 32\]: it is transposed, store it the other way round$"),
        ({"head.bias": lambda t: None}, "only a part of the classifier and lacks head.bias: store that too, or add --num-"),
        ({"head.bias": lambda t: t[:2]}, r"head.bias of the classifier is \[2\], .* takes \[4\]: check the file"),
        ({"pos_embed": lambda t: t.to(torch.complex64)}, "pos_embed is complex64 .*store it as floating-point numbers$"),
        ({"head.weight": lambda t: t.to(torch.complex64)}, "head.weight is complex64 .*store it as floating-point numbers$"),
        ({"head.weight": lambda t: t.to(torch.int32)}, "head.weight is int32 .*store it as floating-point numbers$"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("asked", [{}, {"num_classes": 4}])
def test_what_is_in_force_already_is_not_proposed(tmp_path, change, words, asked):
    state = model_of().state_dict()
    state |= {key: make(state[key]) for key, make in change.items()}
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        taken(tmp_path / "w.pth", **asked)


def test_the_number_of_classes_in_python(tmp_path):
    """A spec by hand takes nothing from the checkpoint by itself."""
    torch.save(model_of().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="the file has 4 classes, vit_tiny_patch16_224 has 1000: add --num-classes 4"):
        load_model(ModelSpec(name="x", timm_name=NAME, kwargs=SMALL, weights=str(tmp_path / "w.pth")))


def test_another_architecture_is_named(tmp_path):
    torch.save({"state_dict": model_of(name="convnext_atto").state_dict(), "arch": "convnext_atto"}, tmp_path / "w.pth.tar")
    with pytest.raises(UserError, match="the file says that it is convnext_atto; .* of vit_tiny_patch16_224: give that name"):
        taken(tmp_path / "w.pth.tar")


def test_integers_are_no_weights(tmp_path):
    state = model_of().state_dict()
    torch.save({**state, "norm.weight": state["norm.weight"].to(torch.int8)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="norm.weight is int8 .32., expected .32."):
        taken(tmp_path / "w.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_training_is_refused(tmp_path, value):
    state = model_of().state_dict()
    state["blocks.1.mlp.fc2.weight"].view(-1)[5] = value
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="not finite in blocks.1.mlp.fc2.weight"):
        taken(tmp_path / "w.pth")


def torchscript(path):
    torch.jit.script(nn.Linear(2, 2)).save(str(path))


def compressed(path):
    torch.save({"a": torch.zeros(1 << 16)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def cut(path):
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])


def short_storage(path):
    """A tensor that claims more numbers than its record in the archive has."""
    torch.save({"a": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    parts[pickled] = parts[pickled].replace(b"K\x04", b"J\x00\x00\x00\x10")  # 4 to 2**28, as its size and as its storage's
    assert parts[pickled].count(b"J\x00\x00\x00\x10") >= 2
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


BAD = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "text": (lambda p: p.write_text("weights"), "is no checkpoint that torch.save wrote"),
    "zeros": (lambda p: p.write_bytes(bytes(1000)), "is no checkpoint that torch.save wrote|is damaged"),
    "cut short": (cut, "is damaged or no checkpoint by torch.save"),
    "compressed": (compressed, "is a compressed archive"),
    "a storage too short": (short_storage, "is damaged|claims tensors"),
    "a tensor larger than the file": (lambda p: torch.save({"a": torch.zeros(1).expand(1 << 40)}, p), "claims tensors of"),
    "many views of one storage": (
        lambda p: torch.save({f"a{i}": t for i, t in enumerate([torch.zeros(1 << 14)] * 40)}, p), "claims tensors of",
    ),
    "TorchScript": (torchscript, "is a TorchScript archive, which is code"),
    "a whole module": (lambda p: torch.save(nn.Linear(2, 2), p), "wants torch.nn.modules.linear.Linear"),
    "a NumPy number": (lambda p: torch.save({"metric": np.float64(1), "model": {"a": torch.zeros(1)}}, p), r"wants numpy[\w.]+"),
    "a path in the arguments": (
        lambda p: torch.save({"args": argparse.Namespace(out=pathlib.PurePosixPath("x")), "model": {"a": torch.zeros(1)}}, p),
        "wants pathlib[.\\w]*PurePosixPath",
    ),
    "a list": (lambda p: torch.save([torch.zeros(1)], p), "holds a list"),
    "a tensor": (lambda p: torch.save(torch.zeros(1), p), "holds a Tensor"),
    "no tensors": (lambda p: torch.save({"epoch": 3, "args": argparse.Namespace()}, p), r"no tensors by name \(epoch, args\)"),
    "an absent file": (lambda p: None, "not found"),
    "a folder": (lambda p: p.mkdir(), "is no ordinary file"),
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True], ids=["", "before 2020"])
@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_a_sentence(tmp_path, case, old, monkeypatch):
    write, words = BAD[case]
    if old:
        real = torch.save
        monkeypatch.setattr(torch, "save", lambda body, path: real(body, path, _use_new_zipfile_serialization=False))
        if case in ("compressed", "a storage too short", "TorchScript"):
            pytest.skip("an archive")
    path = tmp_path / "w.pth"
    write(path)
    with pytest.raises(UserError, match=words) as error:
        taken(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 500


def test_other_endings_and_devices(tmp_path):
    (tmp_path / "w.onnx").write_bytes(b"x")
    for path, words in ((tmp_path / "w.onnx", "ends in .onnx; expected .safetensors, .pth"), ("/dev/zero", "no ordinary file")):
        with pytest.raises(UserError, match=words):
            read_checkpoint(pathlib.Path(path))


def test_prefixes_are_those_that_names_have():
    assert prefixes(["module.model.a", "head.b"]) == ["", "module.", "module.model."]
    assert prefixes(["blocks.0"]) == [""]


def test_an_artifact_takes_the_part_that_was_recorded(tmp_path):
    """Though another would fit as well."""
    state = model_of().state_dict()
    torch.save({"state_dict": state, "state_dict_ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "w.pth")
    _, spec, _ = taken(tmp_path / "w.pth")
    assert spec.part.container == "state_dict_ema"
    plain = spec.model_copy(update={"part": spec.part.model_copy(update={"container": "state_dict"})})
    assert equal(load_model(plain), state) and not equal(load_model(spec), state)
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


class Counted(dict):
    """A dictionary that counts how often it is walked."""

    walks = 0

    def items(self):
        self.walks += 1
        return super().items()


@pytest.mark.parametrize("leaf", [{}, {"a": torch.zeros(1)}], ids=["no tensors", "tensors"])
def test_one_dictionary_under_very_many_names_is_walked_a_few_times(tmp_path, leaf):
    """A file of a few kilobytes can hold 60 x 60 x 60 of them."""
    counted = Counted(leaf)
    third = {f"c{i}": counted for i in range(60)}
    second = {f"b{i}": third for i in range(60)}
    torch.save({"a": torch.zeros(99)}, path := tmp_path / "w.pth")
    found = containers({"model": {"a": torch.zeros(1)}, **{f"a{i}": second for i in range(60)}}, path)
    assert len(found) == (MAX_CONTAINERS if leaf else 1) and counted.walks < 4 * MAX_CONTAINERS


def test_a_state_under_two_names_has_both(tmp_path):
    """An artifact may have recorded either."""
    state = model_of().state_dict()
    torch.save({"model": state, "model_ema": state}, tmp_path / "w.pth")
    assert taken(tmp_path / "w.pth")[1].part.container == "model_ema"
    assert [name for name, _ in containers(read_checkpoint(tmp_path / "w.pth"), tmp_path / "w.pth")] == ["model_ema", "model"]


def test_only_a_few_prefixes_and_containers_are_tried(monkeypatch):
    words = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.")
    names = [a + b + c + "x" for a in words for b in words for c in words]
    assert len(prefixes(names)) == MAX_PREFIXES and prefixes(names)[0] == ""
    model, tried = model_of(), []
    monkeypatch.setattr("moee.weights.fitting._fits", lambda name, *rest: tried.append(name) or iter(()))
    small = [(f"states.{i}", {"exp_avg": torch.zeros(1)}) for i in range(60)]
    best_fit([*small, ("model", model.state_dict())], model, ("head",))
    assert tried[MAX_TRIED - 1] == "model" and set(tried[MAX_TRIED:]) <= {"model"}, "the largest is among them"
    tried.clear()
    best_fit([*small, ("model", model.state_dict())], model, ("head",), ("states.59", ""))
    assert tried == ["states.59"], "what an artifact recorded is tried wherever it stands"


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "levit_128s"])
def test_counters_of_batch_norms_in_half_precision(tmp_path, name):
    """Scalars: a cast of the whole state casts them too."""
    model = timm.create_model(name, num_classes=4).eval()
    assert any(t.ndim == 0 for t in model.state_dict().values())
    torch.save({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "w.pth")
    loaded, spec, _ = taken(tmp_path / "w.pth", name)
    assert spec.kwargs["num_classes"] == 4
    assert all(torch.equal(loaded.state_dict()[k], v.half().to(v.dtype)) for k, v in model.state_dict().items())


def test_two_models_in_one_file_are_two(tmp_path):
    state = model_of().state_dict()
    torch.save({"state_dict": state, "state_dict_ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "w.pth")
    _, spec, _ = taken(tmp_path / "w.pth")
    plain = spec.model_copy(update={"part": spec.part.model_copy(update={"container": "state_dict"})})
    assert plain.weights_sha256 == spec.weights_sha256 and plain.identity() != spec.identity()


def changed(state):
    return {key: tensor + 1 for key, tensor in state.items()}


def under(prefix, state):
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap, part, other",
    [
        (lambda s: {"model": s, "best_model": changed(s)}, ("model", ""), "best_model"),
        (lambda s: {"model": s, "ema_slow": changed(s), "ema": changed(changed(s))}, ("ema_slow", ""), "ema"),
        (lambda s: under("model.", s) | under("policy.", changed(s)), ("", "model."), "policy"),
        (lambda s: under("backbone.", s) | under("encoder.", changed(s)), ("", "backbone."), "encoder"),
        (lambda s: s | under("best.", changed(s)), None, None),
        (lambda s: {"a": s, "b": s}, ("a", ""), ""),
        (lambda s: {"state_dict": changed(s), "state_dict_ema": s}, ("state_dict_ema", ""), ""),
        (lambda s: under("model.", changed(s)) | under("ema_model.", s), ("", "ema_model."), ""),
        (lambda s: under("model.", changed(s)) | under("model_ema.module.", s), ("", "model_ema.module."), ""),
        (lambda s: under("student.backbone.", changed(s)) | under("teacher.backbone.", s), ("", "teacher.backbone."), ""),
    ],
)
def test_other_weights_that_fit_as_well_are_named(tmp_path, wrap, part, other):
    """Averaged ones are taken by rule, wherever they stand; of others the first, and the rest is named."""
    state = model_of().state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    if part is None:  # names of the model itself, and more beside them
        with pytest.raises(UserError, match="does not fit"):
            taken(tmp_path / "w.pth")
        return
    _, spec, notes = taken(tmp_path / "w.pth")
    assert (spec.part.container, spec.part.prefix) == part
    said = [note for note in notes if "that fit as well" in note]
    assert [f"fit as well: {other};" in note for note in said] == ([True] if other else [])


@pytest.mark.parametrize("unfit, kind", [(lambda t: t.to_sparse(), "sparse_coo"), (lambda t: t.to("meta"), "meta")])
@pytest.mark.parametrize("key", ["head.weight", "blocks.0.mlp.fc1.weight"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_a_tensor_that_cannot_be_used_is_named(tmp_path, unfit, kind, key, prefix):
    state = model_of().state_dict()
    state[key] = unfit(state[key])
    name = key if prefix == "backbone." and key.startswith("head") else prefix + key  # a head beside a backbone
    wrapped = {(k if k.startswith("head") and prefix == "backbone." else prefix + k): t for k, t in state.items()}
    torch.save({"model": wrapped}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"{name} is .*{kind}"):
        taken(tmp_path / "w.pth")


def sharded(folder, first, second, places):
    """An index of two shards, as transformers writes it."""
    folder.mkdir()
    for name, tensors in (("a.safetensors", first), ("b.safetensors", second)):
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder / "model.safetensors.index.json"


def test_a_tensor_is_read_from_the_shard_that_the_index_names(tmp_path):
    """Another shard may hold an older one of its name, and things that are no weights of the model."""
    state = model_of().state_dict()
    key, *others = state
    places = {key: "a.safetensors", **dict.fromkeys(others, "b.safetensors")}
    stale = {**state, key: state[key] + 1, "step": torch.ones(1)}
    loaded, _, notes = taken(sharded(tmp_path / "stale", {key: state[key]}, stale, places))
    assert equal(loaded, state) and notes[0] == f"model.safetensors.index.json: {len(state)} tensors"
    lacking = sharded(tmp_path / "lacking", {}, state, places)
    with pytest.raises(UserError, match=f"'{key}' is not in 'a.safetensors', which it names for it; save it again"):
        taken(lacking)


@pytest.mark.parametrize("prefix", ["vit.", "timm_model.", "encoder.vit.", "net.0.", "my._orig_mod.part."])
def test_a_prefix_that_nobody_knows_is_taken_where_the_model_is_under_it_and_said(tmp_path, prefix):
    state = model_of().state_dict()
    torch.save({"state_dict": under(prefix, state) | {"loss.weight": torch.ones(4)}}, tmp_path / "w.pth")
    loaded, spec, notes = taken(tmp_path / "w.pth")
    assert equal(loaded, state) and spec.part.prefix == prefix and spec.kwargs["num_classes"] == 4
    assert notes[0] == f"w.pth: state_dict, {len(state)} tensors, prefix {prefix} removed, loss.weight left out"
    del state["blocks.0.norm1.bias"]
    torch.save(under(prefix, state), tmp_path / "less.pth")
    with pytest.raises(UserError, match=f"under {prefix} fit the 32 of .*: 1 tensors missing .blocks.0.norm1.bias"):
        taken(tmp_path / "less.pth")


@pytest.mark.parametrize("twins", [("a.", "b."), ("vit.", "old.vit."), ("ema.a.", "ema.b.")])
def test_two_models_under_prefixes_that_nobody_knows_are_refused_by_name(tmp_path, twins):
    state = model_of().state_dict()
    one, two = twins
    torch.save(under(one, state) | under(two, changed(state)), tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"prefixes {one}, {two}, and under each lie other weights .* save those .* alone"):
        taken(tmp_path / "w.pth")
    torch.save(under(one, state) | under(two, state), tmp_path / "same.pth")
    assert equal(taken(tmp_path / "same.pth")[0], state)
    torch.save(under("vit.", changed(state)) | under("vit_ema.", state), tmp_path / "averaged.pth")
    assert equal(taken(tmp_path / "averaged.pth")[0], state)


def test_a_head_from_beside_a_prefix_is_said(tmp_path):
    state = model_of().state_dict()
    torch.save({(k if k.startswith("head.") else f"vit.{k}"): v for k, v in state.items()}, tmp_path / "w.pth")
    loaded, _, notes = taken(tmp_path / "w.pth")
    assert equal(loaded, state) and "prefix vit. removed, head.weight, head.bias from beside it" in notes[0]


def test_parts_that_were_compiled_have_their_names_back(tmp_path):
    state = model_of().state_dict()
    wrapped = {key.replace("blocks.0.", "blocks.0._orig_mod.").replace("mlp.", "mlp._orig_mod."): t for key, t in state.items()}
    torch.save(under("module.", wrapped), tmp_path / "w.pth")
    loaded, spec, notes = taken(tmp_path / "w.pth")
    assert equal(loaded, state) and spec.part.prefix == "module." and "_orig_mod inside of names removed" in notes[0]


COMPUTED = {
    r"factors of LoRA .*lora_A.* merge_and_unload": ("attn.qkv.weight", ("attn.qkv.weight", "attn.qkv.lora_A.default.weight")),
    r"factors of LoRA .*base_layer": ("attn.qkv.weight", ("attn.qkv.base_layer.weight",)),
    r"parametrisations .*remove_parametrizations": ("mlp.fc1.weight", ("mlp.fc1.parametrizations.weight.original0",)),
    r"weight norm .*remove_weight_norm": ("mlp.fc1.weight", ("mlp.fc1.weight_g", "mlp.fc1.weight_v")),
    r"spectral norm .*remove_spectral_norm": ("mlp.fc1.weight", ("mlp.fc1.weight_orig", "mlp.fc1.weight_u")),
    r"masks of pruning .*prune.remove": ("mlp.fc1.weight", ("mlp.fc1.weight_orig", "mlp.fc1.weight_mask")),
}  # fmt: skip


@pytest.mark.parametrize("words", COMPUTED)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_weights_that_are_computed_from_others_are_called_so(tmp_path, words, prefix):
    state = model_of().state_dict()
    key, parts = COMPUTED[words]
    weight = state.pop(f"blocks.0.{key}")
    torch.save(under(prefix, state | {f"blocks.0.{part}": weight for part in parts}), tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        taken(tmp_path / "w.pth")
