"""timm's flags on the command line: a checkpoint of one's own from images to a tuned artifact, and what is refused."""

import argparse
import json
import os
import shutil
import time

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from exporter import cli
from exporter.pretrained import ModelOptions, resolve
from exporter.report.commands import _extract
from exporter.terminal.flags import add_model, model_flags
from moee.artifacts import checkpoint
from moee.data.class_map import read_class_map
from moee.data.transform import model_transform
from moee.errors import MissingDependency, UserError
from moee.models.model import load_model
from moee.models.source import named_spec, with_file, with_pretrained
from moee.weights import hub
from tests.exporter.command import run

KWARGS = ["embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"]
MODEL = ["vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", *KWARGS]
SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
FAST = ["--clusters", "3", "--cluster-tokens", "200", "--tokens", "400"]
CLASSES = ("rose", "daisy", "tulip", "aster")  # not as folders are sorted


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images of four classes, a checkpoint as timm's train.py leaves it, and a class map."""
    monkeypatch.chdir(tmp_path)
    source = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in CLASSES:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = source.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    torch.manual_seed(3)
    model = timm.create_model(MODEL[0], num_classes=4, **SMALL)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    arguments = argparse.Namespace(model=MODEL[0], num_classes=4, lr=1e-3)
    body = {"epoch": 1, "arch": MODEL[0], "state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state,
            "args": arguments, "metric": 50.0, "version": 2, "optimizer": {"state": {}, "param_groups": []}}  # fmt: skip
    torch.save(body, "model_best.pth.tar")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return tmp_path, model


def test_from_a_checkpoint_to_a_tuned_model(folder, capsys):
    """The averaged weights are the dense model of every command, wherever the file lies later; labels are in the map's order."""
    place, model = folder
    given = ["--data", "images", "--checkpoint", "model_best.pth.tar", "--class-map", "classes.txt"]
    assert run("extract", *MODEL, *given, *FAST, "--out", "extracted") == 0
    said = capsys.readouterr().out
    assert "model_best.pth.tar: state_dict_ema, " in said and "tensors, prefix module. removed" in said
    assert "4 classes, as the classifier of model_best.pth.tar has" in said
    moee = checkpoint.load("extracted")
    assert moee.classes == CLASSES and moee.spec.kwargs["num_classes"] == 4
    assert all(torch.equal(a, b) for a, b in zip(moee.dense().state_dict().values(), model.state_dict().values(), strict=True))
    shutil.move("model_best.pth.tar", "elsewhere.pth.tar")
    tune = ["finetune", "extracted", "--data", "images", "--epochs", "1", "--lr", "1e-7", "--out", "tuned"]
    assert run(*tune) == 2
    error = capsys.readouterr().err
    lost = os.path.abspath("model_best.pth.tar")
    assert f"weights {lost} not found: put the file back, or give its new place with --checkpoint" in error
    assert run(*tune, "--checkpoint", "elsewhere.pth.tar") == 0
    assert checkpoint.load("tuned").spec.weights == os.path.abspath("elsewhere.pth.tar")
    assert run("inspect", "tuned") == 0, "shapes need no file"
    torch.save(model.state_dict(), "elsewhere.pth.tar")
    capsys.readouterr()
    assert run("export", "tuned", "--out", "export") == 2
    assert "elsewhere.pth.tar have changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--checkpoint", "six.pth", "--num-classes", "5"], "six.pth has 6 classes, --num-classes says 5"),
        (["--checkpoint", "other.pth"], "belongs to another model"),
        (["--checkpoint", "pickle.pth"], "wants numpy"),
        (["--checkpoint", "empty.pth"], "empty.pth is empty"),
        (["--checkpoint", "absent.pth"], "checkpoint absent.pth not found"),
        (["--checkpoint", "six.pth", "--pretrained"], "--pretrained and --checkpoint each name the weights"),
        (["--weights", "six.pth", "--random-weights", "0"], "--checkpoint and --random-weights each name the weights"),
        (["--random-weights", "0", "--num-classes", "4", "--class-map", "two.txt"], "2 classes are named, and"),
        (["--random-weights", "0", "--class-map", "absent.txt"], "--class-map absent.txt is no text file"),
        (["--random-weights", "0", "--model-kwargs", "img_size=64"], "--img-size and --model-kwargs both give img_size"),
        (["--random-weights", "0", "--model-kwargs", "checkpoint_path=x.pth"], "it would open files"),
        (["--random-weights", "0", "--model-kwargs", "depth=b'x'"], "expected numbers, texts, lists and None"),
        (["--random-weights", "0", "--model-kwargs", "depth"], "expected name=value, came 'depth'"),
        (["--random-weights", "0", "--model-kwargs", "depth=2", "--model-kwargs", "depth=1"], "depth is given twice"),
        (["--random-weights", "-1"], "expected a whole number from 0 to"),
        (["--pretrained", "--num-classes", "4"], "have 1000 classes, --num-classes says 4: leave it out, or give 0"),
    ],
)
def test_bad_input_ends_before_any_image_is_read(tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: pytest.fail("images were read"))
    torch.save(timm.create_model(MODEL[0], num_classes=6, **SMALL).state_dict(), "six.pth")
    torch.save(timm.create_model("test_convnext").state_dict(), "other.pth")
    torch.save({"metric": np.float64(1), "state_dict": {}}, "pickle.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "two.txt").write_text("a\nb\n")
    model = MODEL if "--model-kwargs" not in flags else MODEL[:3]
    assert run("extract", *model, "--data", "digits", *flags, "--out", "out") == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_model_arguments_may_be_given_in_several_parts():
    parser = argparse.ArgumentParser()
    add_model(parser)
    line = ["tiny", "--data", "digits", "--model-kwargs", "num_heads=4", "--pretrained", "--model-kwargs", "global_pool=avg"]
    assert parser.parse_args(line).model_kwargs == {"num_heads": 4, "global_pool": "avg"}
    assert parser.parse_args(["tiny", "--data", "digits"]).model_kwargs == {}


def test_every_command_takes_the_same_flags():
    parser = argparse.ArgumentParser()
    add_model(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help", "--data", "--class-map"}
    commands = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for name in ("extract", "plan", "ablate", "ablate-clear", "inspect"):
        assert flags <= {flag for action in commands[name]._actions for flag in action.option_strings}, name


def test_help_says_what_a_value_is_and_does_not_repeat_the_flag():
    commands = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    wrong = []
    for command, inner in commands.items():
        for action in inner._actions:
            if not action.option_strings or action.nargs == 0:
                continue
            flag = action.option_strings[0]
            if not (action.metavar or action.choices) or action.metavar == flag.strip("-").replace("-", "_").upper():
                wrong.append(f"{command} {flag} {action.metavar}")
    assert not wrong


def test_flags_are_repeated_for_the_next_command():
    parser = argparse.ArgumentParser()
    add_model(parser)
    words = [*MODEL, "--data", "x", "--checkpoint", "w.pth", "--num-classes", "4", "--in-chans", "1", "--class-map", "c.txt"]
    args = parser.parse_args(words)
    assert args.model_kwargs == {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    again = parser.parse_args([args.model, "--data", "x", *model_flags(args)])
    assert again == args
    spec = {"name": "vit", "timm_name": "vit", "weights": "/a/w.pth", "kwargs": {"num_classes": 4, "depth": 2}}
    assert "--checkpoint /a/w.pth --num-classes 4 --model-kwargs depth=2" in _extract({"model": spec, "data": "x"})[-1]


def test_inspect_takes_the_classes_of_a_checkpoint(folder, capsys):
    assert run("inspect", *MODEL, "--checkpoint", "model_best.pth.tar", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["dense"]["params"] == sum(p.numel() for p in folder[1].parameters())


@pytest.mark.parametrize("source", [["--pretrained"], ["--random-weights", "0"], ["--checkpoint", "w", "--random-weights", "0"]])
def test_inspect_refuses_weights_that_it_would_not_read(capsys, source):
    assert run("inspect", "test_vit", *source) == 2
    assert f"{source[-2:][0]}: inspect works by shapes alone" in capsys.readouterr().err


def test_a_class_map_with_very_many_lines_is_refused_at_once(tmp_path):
    (tmp_path / "map.txt").write_text("".join(f"{i}\n" for i in range(400_000)) + "399999\n")
    started = time.perf_counter()
    with pytest.raises(UserError, match="400001 names"):
        read_class_map(tmp_path / "map.txt")
    assert time.perf_counter() - started < 20, "one that compares all with all takes minutes"


@pytest.mark.parametrize(
    "name, weights, shown",
    [
        ("vit", "/a/w.pth", "--checkpoint /a/w.pth --num-classes 4 --img-size 32 --model-kwargs depth=2"),
        ("local-dir:/m", "/m/model.safetensors", "--num-classes 4 --img-size 32 --model-kwargs depth=2"),
        ("local-dir:/m", "/a/w.pth", "--checkpoint /a/w.pth --num-classes 4 --img-size 32 --model-kwargs depth=2"),
        ("hf-hub:a/b", "/h/models--a--b/snapshots/1/model.safetensors", "--num-classes 4 --img-size 32 --model-kwargs depth=2"),
        ("hf-hub:a/b@v1", "/a/w.pth", "--checkpoint /a/w.pth --num-classes 4 --img-size 32 --model-kwargs depth=2"),
        ("dinov2-s", "/c/w.safetensors", "--img-size 32"),
        ("vit-scratch", "/c/w.safetensors", ""),
    ],
)
def test_the_printed_command_has_the_models_flags(name, weights, shown):
    spec = {"name": name, "timm_name": "vit", "weights": weights, "kwargs": {"num_classes": 4, "img_size": 32, "depth": 2}}
    line = _extract({"model": spec, "data": "x"})[-1]
    assert line == " ".join(f"moee extract {name} --data x {shown} --out extracted".split())
    cli.build_parser().parse_args(line.split()[1:])


@pytest.mark.parametrize(
    "text, names",
    [
        ("rose\ndaisy\n", ("rose", "daisy")),
        ("golden retriever\npug\n\n", ("golden retriever", "pug")),
        ("daisy 1\nrose 0\n", ("rose", "daisy")),
        ("golden retriever\t1\npug\t0\n", ("pug", "golden retriever")),
        ("0\n1\n", ("0", "1")),
        ("route 66\nroad\n", ("route 66", "road")),
        ("\ufeffrose\r\ndaisy\r\n", ("rose", "daisy")),
        ("type 3\ntype 2\n", ("type 3", "type 2")),
        ("type 1\ntype 0\n", ("type 1", "type 0")),
    ],
)
def test_class_maps(tmp_path, text, names):
    (tmp_path / "map.txt").write_text(text, encoding="utf-8")
    assert read_class_map(tmp_path / "map.txt") == names


@pytest.mark.parametrize(
    "data, words",
    [
        (b"a\nb\na\n", "names 'a' twice"), (b"a 0\nb 2\n", "numbers its classes 0, 2; expected 0 to 1"), (b"", "0 names"),
        (b"\xff\xfe", "is no text"), (b"cat 1\ndog 2\n", "numbers its classes 1, 2"), (b"a\t1\na\t0\n", "names 'a' twice"),
        (b"a\n" * 40000, "40000 names"),
        (b"a\nb\x1b[2J\n", "has the name"), (b"one\n", "1 names"), (b"x" * 300 + b"\ny", "has the name"),
    ],
)  # fmt: skip
def test_bad_class_maps(tmp_path, data, words):
    (tmp_path / "map.txt").write_bytes(data)
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        read_class_map(tmp_path / "map.txt")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_as_timm_saves_it_for_the_hub(tmp_path, file):
    """Architecture, arguments, weights and how images are prepared come from the folder; flags win over its arguments."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL[0], num_classes=3, **SMALL)
    config = {
        "architecture": MODEL[0], "num_classes": 3, "model_args": SMALL, "label_names": ["a", "b", "c"],
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32], "crop_pct": 0.7,
                           "interpolation": "bilinear", "num_classes": 3, "url": "file:///etc/passwd", "classifier": "head"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / file) if file.endswith("s") else torch.save(model.state_dict(), tmp_path / file)
    spec = resolve(f"local-dir:{tmp_path}")
    loaded = load_model(spec)
    assert torch.equal(loaded.head.weight, model.head.weight) and spec.timm_name == MODEL[0]
    transform = model_transform(loaded)
    assert (tuple(transform.mean), tuple(transform.std)) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert resolve(f"local-dir:{tmp_path}", options=ModelOptions(img_size=[64])).kwargs["img_size"] == 64
    drawn = resolve(f"local-dir:{tmp_path}", options=ModelOptions(random_weights=1))
    assert drawn.random_seed == 1 and drawn.weights is None
    # what the file leaves out is timm's default, and not what the architecture's own weights were trained with
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 3, "std": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    ours = model_transform(load_model(resolve(f"local-dir:{tmp_path}"))).config
    assert {name: ours[name] for name in own if name != "input_size"} == {name: own[name] for name in own if name != "input_size"}


@pytest.mark.parametrize(
    "config, words",
    [
        (None, "config.json not found"), ("{", "is not readable JSON"), ("[]", "holds no JSON object"),
        ('{"architecture": "nonsense"}', "names the architecture 'nonsense'"),
        ('{"architecture": 3}', "names the architecture 3"),
        ('{"architecture": "test_vit"}', "holds no weights; expected one of model.safetensors"),
        ('{"architecture": "test_vit", "model_args": [1]}', "no object in model_args"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"crop_pct": -1}}', "crop_pct of the model's configuration"),
        ('{"architecture": "test_vit", "model_args": {"checkpoint_path": "x"}}', "would open files"),
        ('{"architecture": "test_vit", "model_args": {"depth": 1000000}}', "config.json asks for 'depth' 1000000"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"std": [0.5, 0, 0.5]}}', "std.1 of the model's configuration"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"std": [NaN]}}', "std.0 of the model's configuration"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"mean": [0.5, Infinity]}}', "mean.1 of the model's configuration"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"mean": []}}', "mean of the model's configuration"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"std": []}}', "std of the model's configuration"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"input_size": [9999999, 8, 8]}}', "input_size.0 of the model's conf"),
    ],
)  # fmt: skip
def test_bad_folders(tmp_path, config, words):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    if "holds no weights" not in words:
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=words):
        resolve(f"local-dir:{tmp_path}")


def test_names_that_look_like_paths_are_explained():
    names = {"timm/vit": "Use 'hf-hub:timm/vit'",
             "ftp:x": "there is no module ftp", "ftp:/x": "Unknown model source 'ftp'", "hf-hub:": "no model id"}
    for name, words in names.items():
        with pytest.raises(UserError, match=words):
            named_spec(name, {})


@pytest.mark.parametrize("pretrained", [True, False], ids=["pretrained", "hf-hub"])
def test_without_a_network_one_line_and_no_waiting(monkeypatch, tmp_path, pretrained, capsys):
    """The hub's own client tries six times, for almost a minute."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    model = ["test_vit", "--pretrained"] if pretrained else ["hf-hub:someone/some-model"]
    started = time.perf_counter()
    assert run("extract", *model, "--data", "digits", "--out", tmp_path / "out") == 3
    assert time.perf_counter() - started < 20, "one that compares all with all takes minutes"
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Retry" not in error
    command = "hf download timm/test_vit.r160_in1k" if pretrained else "hf download someone/some-model"
    assert f"where there is a network run `{command}`, then give the file with --checkpoint" in error
    assert constants.HF_HUB_OFFLINE is False, "as it was"


def test_a_hub_that_answers_is_asked(monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("urllib.request.getproxies", dict)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert hub.reachable()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not hub.reachable()


def test_models_without_pretrained_weights():
    with pytest.raises(UserError, match="timm has no pretrained weights of vit_small_patch16_18x2_224"):
        with_pretrained(named_spec("vit_small_patch16_18x2_224", {})[0])


def test_a_hub_that_fails_says_its_kind(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("refused")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(MissingDependency, match="could not be fetched .OSError."):
        hub.pretrained_model("test_vit")


def test_an_old_hub_client_whose_error_is_a_value_error(monkeypatch):
    """Of huggingface_hub 0.x: a file that is not cached is missing, and no argument is wrong."""

    class LocalEntryNotFoundError(FileNotFoundError, ValueError):
        pass

    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(MissingDependency, match="could not be fetched .LocalEntryNotFoundError."):
        with_pretrained(named_spec("test_vit", {})[0])


def test_grey_checkpoints_need_their_flag(tmp_path):
    torch.save(timm.create_model(MODEL[0], num_classes=4, in_chans=1, **SMALL).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="add --in-chans 1"):
        with_file(named_spec(MODEL[0], SMALL)[0], tmp_path / "w.pth")
    spec, _ = with_file(named_spec(MODEL[0], {**SMALL, "in_chans": 1})[0], tmp_path / "w.pth")
    assert load_model(spec).patch_embed.proj.weight.shape[1] == 1
