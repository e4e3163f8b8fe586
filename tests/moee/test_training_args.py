"""What the arguments in a checkpoint of timm's train.py decide: images prepared as its validation prepares them."""

import argparse

import pytest
import timm
import torch
from timm.data import resolve_data_config

from moee.data.transform import model_transform
from moee.errors import UserError
from moee.models.input_size import sized
from moee.models.model import load_model
from moee.models.source import named_spec, with_file
from moee.models.training_args import as_trained, training_args


def saved(folder, name="test_vit", kind=argparse.Namespace, state=None, **args):
    """A checkpoint as train.py writes it, of a model with random weights."""
    if state is None:
        torch.manual_seed(0)
        state = timm.create_model(name, num_classes=3).state_dict()
    torch.save({"epoch": 1, "arch": name, "state_dict": state, "args": kind(**args)}, folder / "w.pth.tar")
    return folder / "w.pth.tar"


def loaded(path, name="test_vit", size=None, **kwargs):
    spec = named_spec(name, kwargs)[0]
    spec, notes = with_file(spec if size is None else sized(spec, size), path)
    return load_model(spec), spec, notes


@pytest.mark.parametrize(
    "args",
    [
        {"crop_pct": 0.5}, {"mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7]}, {"mean": (0.5,), "std": (0.4,)},
        {"interpolation": "nearest"}, {"crop_mode": "squash"}, {"img_size": 96}, {"input_size": [3, 64, 96], "img_size": 32},
        {"crop_pct": None, "mean": None, "std": None, "interpolation": "", "crop_mode": None, "img_size": None},
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_images_are_prepared_as_timms_validation_does(tmp_path, args, kind):
    path = saved(tmp_path, "test_convnext", kind, model="test_convnext", **args)
    model, spec, notes = loaded(path, "test_convnext")
    wanted = resolve_data_config(args, model=timm.create_model("test_convnext"))
    ours = model_transform(model)
    assert (ours.shape, ours.mean, ours.std) == (wanted["input_size"], tuple(wanted["mean"]), tuple(wanted["std"]))
    for key in ("interpolation", "crop_pct", "crop_mode"):
        assert ours.config[key] == wanted[key]
    said = [note for note in notes if note.endswith(", taken")]
    assert len(said) == any(value for value in args.values())
    assert all(name.replace("img_size", "pixels").replace("input_size", "pixels") in said[0] for name, v in args.items() if v)
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


def test_a_size_that_the_user_gives_wins(tmp_path):
    state = timm.create_model("test_vit", num_classes=3, img_size=64).state_dict()
    path = saved(tmp_path, state=state, img_size=64, model="test_vit")
    assert model_transform(loaded(path)[0]).shape == (3, 64, 64), "the constructor of a Vision Transformer gets it"
    model, _, notes = loaded(path, size=(96,))
    assert model_transform(model).shape == (3, 96, 96) and not any("taken" in note for note in notes)


def test_what_the_training_says_otherwise_is_said(tmp_path):
    other = {"model": "vit_small_patch16_224.augreg", "model_kwargs": {"qk_norm": False}, "gp": "avg"}
    path = saved(tmp_path, class_map="/x/classes.txt", **other)
    *_, notes = loaded(path)
    text = " | ".join(notes)
    assert "says that it is vit_small_patch16_224.augreg; it is taken as test_vit" in text
    assert "its classes were numbered by /x/classes.txt; --class-map takes that file" in text
    assert "--model-kwargs qk_norm=False global_pool=avg, which are not given" in text
    *_, notes = loaded(saved(tmp_path, model="test_vit.r160_in1k"))
    assert len(notes) == 2, "a tag is no other model"


def test_weights_that_do_not_fit_name_the_arguments_of_their_training(tmp_path):
    given = {"qk_norm": True, "img_size": 64}
    state = timm.create_model("test_vit", num_classes=3, **given).state_dict()
    path = saved(tmp_path, state=state, model="test_vit", model_kwargs=given)
    with pytest.raises(UserError, match="does not fit: .*; .* was trained with --model-kwargs qk_norm=True, which are not given"):
        loaded(path)
    assert loaded(path, qk_norm=True)[0].blocks[0].attn.q_norm.weight.shape == (32,)


def test_a_training_whose_images_were_prepared_otherwise_is_said(tmp_path):
    """By a tag of the same model, or another model's name beside weights of equal shapes."""
    name, small = "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    state = timm.create_model(name, num_classes=3, **small).state_dict()
    tag = "says that it is vit_small_patch16_224.dino; it is taken as vit_small_patch16_224, for which images are prepared"
    for arch, model, taken, said in (
        ("deit_tiny_patch16_224", None, name, "says that it is deit_tiny_patch16_224; it is taken as vit_tiny_patch16_224"),
        ("visiontransformer", None, name, ""), ("x", "timm/vit_tiny_patch16_224.augreg_in21k", name, ""),
        ("x", "vit_small_patch16_224.dino", "vit_small_patch16_224", tag), ("x", f"{name}.nonsense", name, ""),
    ):  # fmt: skip
        path = tmp_path / "w.pth"
        torch.save({"arch": arch, "state_dict": state, **({"args": {"model": model}} if model else {})}, path)
        notes = with_file(named_spec(taken, small)[0], path)[1]
        assert [said in note for note in notes if "says that it is" in note] == [True] * bool(said)


@pytest.mark.parametrize(
    "name, value",
    [("crop_pct", 3.0), ("crop_pct", float("nan")), ("crop_pct", "a\x1b"), ("mean", [0.5, 0.5]), ("mean", "imagenet"),
     ("mean", []), ("std", [0.0, 1.0, 1.0]), ("interpolation", "random"), ("interpolation", "magic"), ("crop_mode", ["center"])],
)  # fmt: skip
def test_values_out_of_bounds_are_said_and_not_taken(tmp_path, name, value):
    _, spec, notes = loaded(saved(tmp_path, **{name: value}))
    assert spec.input is None and any(f"its {name}, " in note and note.endswith("not taken") for note in notes)
    assert all(note.isprintable() for note in notes)


def test_a_size_that_the_model_cannot_take_is_refused(tmp_path):
    with pytest.raises(UserError, match="w.pth.tar says that it was trained on 65 x 65 pixels: --img-size 65"):
        loaded(saved(tmp_path, img_size=65))
    *_, notes = loaded(saved(tmp_path, img_size=10**9))
    assert "its img_size, 1000000000, is none that images can be prepared with; not taken" in notes[-1]


@pytest.mark.parametrize(("metric", "args", "said"), [
    (85.0, {}, True), (85.0, {"eval_metric": "top1"}, True), (0.7, {"eval_metric": "loss"}, False), (float("nan"), {}, False),
    (5e9, {}, False), ("85", {}, False), (None, {}, False),
])  # fmt: skip
def test_the_accuracy_of_the_training_is_said(metric, args, said):
    """Else a model whose classes are numbered otherwise here is taken for a bad one."""
    notes = as_trained(named_spec("test_vit", {})[0], {"metric": metric, "args": {"model": "test_vit", **args}}, "w.pth.tar")[1]
    assert [note.split(";")[0] for note in notes] == ["w.pth.tar: its training measured an accuracy of 85.00%"] * said


def test_a_tensor_is_no_argument_of_a_training():
    told = argparse.Namespace(crop_pct=torch.ones(3), gp=torch.ones(2), interpolation="bicubic")
    assert training_args({"args": told}) == {"interpolation": "bicubic"} == training_args({"args": vars(told)})
