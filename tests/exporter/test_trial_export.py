"""What ONNX cannot express is refused before calibration, and what has passed once is not tried again."""

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from exporter.cli import main
from exporter.graph import trial_export
from exporter.graph.trace import to_onnx
from exporter.graph.trial_export import try_export
from moee.errors import UserError, plain
from moee.layers.routed import routed_layers
from moee.mlps.find import find_ffns
from moee.mlps.gated import GatedMLP
from moee.models.ffn import FFN
from moee.models.model import load_model
from tests.conftest import tiny_spec
from tests.exporter.test_architectures import write_images

SHAPE = (3, 32, 32)
ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = ["--model-kwargs", "img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2", "num_classes=4"]
VIT = timm.models.vision_transformer.VisionTransformer


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tried(monkeypatch):
    """The models that would have been exported; each passes."""
    models = []
    monkeypatch.setattr(trial_export, "_deviation", lambda model, *_: models.append(model) or 0.0)
    return models


def attempt(spec=None, shape=SHAPE, exclude=(), model=None, report=lambda *_: None):
    spec = spec or tiny_spec(depth=2)
    model = model or load_model(spec)
    return try_export(spec, model, find_ffns(model, exclude, shape).ffns, shape, report)


def append(monkeypatch, change):
    """Let every ViT change its output."""
    forward = VIT.forward
    monkeypatch.setattr(VIT, "forward", lambda self, x: change(forward(self, x)))


def command(name, tmp_path, *more):
    data = tmp_path / "images"
    if not data.exists():
        write_images(data, 20, 32)
    shared = ["vit_tiny_patch16_224", "--random-weights", "0", "--data", str(data), *FLAGS]
    return main([name, *shared, "--out", str(tmp_path / "out"), *more])


def test_an_operator_that_onnx_lacks_is_refused_before_calibration(monkeypatch, tmp_path, capsys):
    append(monkeypatch, lambda y: y + torch.special.bessel_j0(y))
    monkeypatch.setattr("moee.methods.convert.convert_layers", lambda *_, **__: pytest.fail("calibration began"))
    assert command("extract", tmp_path) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a trial export of one layer of experts failed" in said and "bessel_j0" in said and "--no-trial-export" in said
    assert "\x1b" not in said and "?[" not in said and "unexpected" not in said
    assert not (tmp_path / "out").exists()


def test_plan_refuses_it_too(monkeypatch, tmp_path, capsys):
    append(monkeypatch, lambda y: y + torch.special.bessel_j0(y))
    assert command("plan", tmp_path, "--methods", "static", "--min-cosine", "0.5") == 2
    assert "a trial export" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_earlier_result_stays(monkeypatch, tmp_path, capsys):
    assert command("extract", tmp_path, "--preset", "static") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    append(monkeypatch, lambda y: y + torch.special.bessel_j0(y))
    monkeypatch.setattr(trial_export, "_remembered", lambda path, record: None)  # sources of the test itself are not hashed
    assert command("extract", tmp_path, "--preset", "static", "--force") == 2
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_who_wants_no_onnx_goes_on(monkeypatch, tmp_path):
    append(monkeypatch, lambda y: y + torch.special.bessel_j0(y))
    assert command("extract", tmp_path, "--preset", "static", "--no-trial-export") == 0
    assert (tmp_path / "out" / "moee.json").is_file()
    assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "export")]) == 2


def test_a_branch_on_values_is_refused(monkeypatch):
    append(monkeypatch, lambda y: y if float(y.sum()) > 0 else -y)
    with pytest.raises(UserError, match="a trial export of one layer of experts failed: PyTorch's exporter cannot express"):
        attempt()


def test_a_graph_that_gives_something_else_is_refused(monkeypatch, tmp_path):
    """Such as one that is traced for one number of images, or in another mode."""
    append(monkeypatch, lambda y: y + 1 if torch.compiler.is_exporting() else y)
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(UserError, match="the exported graph of one layer of experts is off by"):
            attempt()
    assert not (tmp_path / "cache" / "trials").exists()


def test_an_architecture_is_tried_once(tried):
    attempt()
    attempt(tiny_spec(depth=2).model_copy(update={"random_seed": 1}))  # other weights are no other architecture
    assert len(tried) == 1


def test_another_architecture_size_or_layer_is_tried(tried):
    attempt()
    attempt(tiny_spec(depth=2, global_pool="avg"))
    attempt(tiny_spec(depth=2, img_size=40), shape=(3, 40, 40))
    assert len(tried) == 3
    attempt(exclude=("blocks.0",))
    assert len(tried) == 5  # one MLP is left, and none that stays: the dense model is tried as well


def test_a_model_of_one_mlp_passes(monkeypatch):
    """No MLP stays dense beside the one that is cut, so the dense model is tried as well."""
    compared = []
    deviation = trial_export._deviation
    monkeypatch.setattr(trial_export, "_deviation", lambda *given: compared.append(deviation(*given)) or compared[-1])
    attempt(tiny_spec(depth=1))
    assert len(compared) == 2 and max(compared) < trial_export.LIMIT


def test_gated_and_plain_mlps_of_one_model_are_both_tried(monkeypatch):
    traced = []
    monkeypatch.setattr(trial_export, "to_onnx", lambda model, example: (traced.append(model), to_onnx(model, example))[1])
    model = load_model(tiny_spec(depth=3))
    dim = model.embed_dim
    model.blocks[1].mlp = timm.layers.SwiGLU(dim, 2 * dim).eval()
    ffns = find_ffns(model, shape=SHAPE, gated=True).ffns
    assert [type(ffn) for ffn in ffns] == [FFN, GatedMLP, FFN]
    try_export(tiny_spec(depth=3), model, ffns, SHAPE)
    ((name, first), (gated, second)) = routed_layers(traced[0]).items()
    assert (name, gated) == ("blocks.0.mlp", "blocks.1.mlp") and type(first) is not type(second)


def test_another_version_or_source_is_another_key(monkeypatch, tmp_path):
    spec = tiny_spec(depth=2)
    model = load_model(spec)
    key = partial(trial_export._key, spec, model, find_ffns(model).ffns[:1], SHAPE)
    keys, version = [key(), key()], trial_export.importlib.metadata.version
    assert len(set(keys)) == 1
    for changed in trial_export.PACKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(trial_export.importlib.metadata, "version", lambda name, changed=changed: version(name) + changed)
            keys.append(key())
    own = tmp_path / "own.py"  # a model's code that was edited
    with monkeypatch.context() as patch:
        patch.setattr(trial_export.inspect, "getsourcefile", lambda kind: str(own))
        for text in ("a = 1", "a = 2"):
            own.write_text(text)
            keys.append(key())
    assert len(set(keys)) == len(keys) - 1


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff", b"[]", b"[" * 5000, b'{"schema": "moee.trial/2", "key": "another", "seconds": 1.0}']
)
def test_a_damaged_record_is_ignored(content, tried, tmp_path):
    attempt()
    (record,) = (tmp_path / "cache" / "trials").iterdir()
    record.write_bytes(content)
    seconds = attempt()
    assert len(tried) == 2 and json.loads(record.read_text())["seconds"] == seconds > 0
    assert attempt() == seconds and len(tried) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tried, tmp_path):
    (tmp_path / "cache").write_text("a file")
    attempt()
    assert len(tried) == 1


def test_the_model_and_the_random_state_stay_and_progress_is_said():
    spec, said = tiny_spec(depth=2), []
    model, state = load_model(spec), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attempt(spec, model=model, report=lambda *args: said.append(args))
    assert torch.equal(torch.get_rng_state(), state) and said == [("trial export", 0, 1), ("trial export", 1, 1)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_learned_bias_that_needs_a_gradient_is_exported():
    """BEiT's and MaxViT's: torch traces another attention for it, whose output their reshapes cannot read."""

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(2, 5, 5))

        def forward(self, x):
            heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
            y = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=self.bias[None])
            return y.transpose(1, 2).reshape(x.shape)

    model = Biased()
    assert len(to_onnx(model, torch.randn(2, 5, 8)).graph) > 0 and model.bias.requires_grad


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[96mThis is step 3/3\x1b[0m of", "This is step 3/3 of"),
        ("\x1b]8;;file:///x\x07name\x1b]8;;\x1b\\ here", "name here"),
        ("\x1b]0;title\x07text", "text"),
        ("a\x1b(b", "a?(b"),
        ("two\nlines\r\x00", "two lines??"),
    ],
)
def test_no_escape_code_is_passed_on(raw, shown):
    assert plain(raw) == shown and str(UserError(raw)) == shown


def test_a_trial_is_remembered_for_the_sources_of_both_packages():
    """A change anywhere in them may change what exports."""
    found = {path.relative_to(ROOT).as_posix() for path in trial_export._sources(torch.nn.Identity()) if ROOT in path.parents}
    assert {"moee/layers/routed.py", "exporter/passes/plain.py", "exporter/cli.py", "plugins/contract.py"} <= found


class Counting(nn.Module):
    """A forward that makes a plain number of the batch size."""

    def forward(self, images):
        return images.flatten(1)[:, :4].reshape(len(images), 4)


def test_a_graph_of_one_batch_size_is_refused_and_not_called_one_of_any():
    with pytest.raises(UserError, match=r"holds for batches of 2 images alone: .*as len\(x\) and int\(x.shape\[0\]\) do"):
        to_onnx(Counting(), (1, 4, 4))
