"""Checkpoints from someone else: safetensors files that lie, and expert tables out of order."""

import argparse
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moee.artifacts import checkpoint
from moee.errors import UserError
from moee.models.model import load_model, load_weights
from moee.store.artifact import sha256_file
from moee.weights.weights_file import containers, read_checkpoint, read_safetensors
from tests.conftest import tiny_spec
from tests.untrusted.fuzzing import COUNTS, accepts_or_refuses, fuzz
from tests.untrusted.tables import TABLE_DAMAGE


@pytest.mark.parametrize("count", COUNTS)
def test_safetensors_with_any_bytes_changed(made, tmp_path, count):
    data = (made / "model" / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    path = tmp_path / "x.safetensors"

    changed = st.lists(st.tuples(st.integers(0, header + 64), st.integers(0, 255)), max_size=4)

    @fuzz(count, changed, st.integers(0, len(data)) | st.none())
    def check(changes, length):
        damaged = bytearray(data)
        for position, value in changes:
            damaged[position] = value
        path.write_bytes(damaged[:length])
        accepts_or_refuses(read_safetensors, path)


@pytest.mark.parametrize("old", [False, True], ids=["archive", "before 2020"])
@pytest.mark.parametrize("count", COUNTS)
def test_checkpoints_by_torch_save_with_any_bytes_changed(tmp_path, count, old):
    """The restricted reader builds what the pickle asks for; whatever it makes of damage is one sentence."""
    path = tmp_path / "w.pth"
    body = {"state_dict": {"a.w": torch.randn(3, 4), "b": torch.ones(5).half()}, "args": argparse.Namespace(betas=[0.9], x=None)}
    torch.save(body, path, _use_new_zipfile_serialization=not old)
    data = path.read_bytes()

    def read():
        return [float(t.float().sum()) for _, tensors in containers(read_checkpoint(path), path) for t in tensors.values()]

    assert len(read()) == 2
    changed = st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=4)

    @fuzz(count, changed, st.integers(0, len(data)) | st.none())
    def check(changes, length):
        damaged = bytearray(data)
        for position, value in changes:
            damaged[position] = value
        path.write_bytes(damaged[:length])
        accepts_or_refuses(read)


def header_of(entries: dict, payload: bytes = bytes(16)) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + payload


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "empty": b"", "cut short": struct.pack("<Q", 100) + b"{", "huge header": struct.pack("<Q", 2**63) + b"{}",
    "overlapping": header_of({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)),
    "the same bytes twice": header_of({"a": entry(), "b": entry()}),
    "past the end": header_of({"a": entry(shape=(400,), offsets=(0, 1600))}),
    "reversed": header_of({"a": entry(offsets=(16, 0))}),
    "negative": header_of({"a": entry(offsets=(-16, 0))}),
    "another size than the shape": header_of({"a": entry(shape=(3,))}),
    "a shape that overflows": header_of({"a": entry(shape=(2**32, 2**32))}),
    "an unknown type": header_of({"a": entry(dtype="PICKLE")}),
    "a hole": header_of({"a": entry(shape=(1,), offsets=(8, 12))}),
    "bytes left over": header_of({"a": entry()}, bytes(64)),
    "no object": struct.pack("<Q", 2) + b"[]", "nested": header_of({"a": {"b": entry()}}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers_that_lie(tmp_path, name):
    (tmp_path / "x.safetensors").write_bytes(HEADERS[name])
    assert not accepts_or_refuses(read_safetensors, tmp_path / "x.safetensors")


def with_tables(folder: Path, change) -> None:
    """Change the first layer's tables in a checkpoint, and make its hash right again: damage that hashes cannot show."""
    state = load_file(folder / "model.safetensors")
    manifest = json.loads((folder / "moee.json").read_text())
    neurons, offsets = change(state["blocks.0.mlp.neurons"].clone(), state["blocks.0.mlp.offsets"].clone())
    state["blocks.0.mlp.neurons"], state["blocks.0.mlp.offsets"] = neurons.contiguous(), offsets.contiguous()
    manifest["layers"][0]["neurons"] = max(1, len(neurons))
    save_file(state, folder / "model.safetensors")
    manifest["files"]["model.safetensors"] = sha256_file(folder / "model.safetensors")
    (folder / "moee.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("change", TABLE_DAMAGE)
def test_expert_tables_of_a_checkpoint(made, tmp_path, change):
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    with_tables(folder, change)
    assert not accepts_or_refuses(checkpoint.load, folder)


TYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool,
    torch.complex64,
]  # fmt: skip
PROBES = [
    {}, {"weight": (3, 32)}, {"weight": (3, 32), "bias": (4,)}, {"weight": (3,), "bias": (3,)},
    {"weight": (0, 32), "bias": (0,)}, {"weight": (3, 31), "bias": (3,)},
]  # fmt: skip


def with_probe(folder: Path, probe: dict[str, torch.Tensor]) -> Path:
    """A copy's probe, with its hash in the manifest."""
    save_file(probe, folder / "probe.safetensors")
    manifest = json.loads((folder / "moee.json").read_text())
    manifest["files"]["probe.safetensors"] = sha256_file(folder / "probe.safetensors")
    (folder / "moee.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("probe", PROBES, ids=str)
def test_probes_that_do_not_fit_together(made, tmp_path, probe):
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    with_probe(folder, {name: torch.zeros(shape) for name, shape in probe.items()})
    with pytest.raises(UserError, match="should hold weight|weights for 31 features"):
        checkpoint.load(folder)


def test_probes_are_read_if_they_fit(made, tmp_path):
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    with_probe(folder, {"weight": torch.zeros(3, 32), "bias": torch.zeros(3)})
    assert checkpoint.load(folder).probe.weight.shape == (3, 32)
    with_probe(folder, {"weight": torch.zeros(3, 32, dtype=torch.int8), "bias": torch.zeros(3)})
    with pytest.raises(UserError, match="torch.int8 weights"):
        checkpoint.load(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.complex64, torch.bool])
@pytest.mark.parametrize("tensor", ["blocks.0.mlp.w_up", "blocks.0.mlp.offsets", "blocks.0.attn.qkv.weight"])
def test_tensors_of_another_type(made, tmp_path, dtype, tensor):
    """Torch would convert some quietly and fail at others much later."""
    if tensor.endswith("offsets") and dtype is torch.int32:
        pytest.skip("the right type")
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    state[tensor] = state[tensor].to(dtype)
    save_file(state, folder / "model.safetensors")
    manifest = json.loads((folder / "moee.json").read_text())
    manifest["files"]["model.safetensors"] = sha256_file(folder / "model.safetensors")
    (folder / "moee.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{tensor} should be .*came .*{str(dtype).removeprefix('torch.')}"):
        checkpoint.load(folder)


def change_of(state):
    """Strategy: (tensor, kind of change, seed) for `tampered`."""
    return st.tuples(st.sampled_from(sorted(state)), st.integers(0, 6), st.integers(0, 2**32))


def tampered(state: dict[str, torch.Tensor], changes) -> dict[str, torch.Tensor]:
    """A copy with tensors left out, renamed, or of another type, shape or value."""
    changed = dict(state)
    for name, kind, seed in changes:
        source = random.Random(seed)
        tensor = changed.pop(name, state[name]).clone()
        if kind == 0:
            continue  # left out
        if kind == 1:
            tensor = tensor.to(source.choice(TYPES))
        elif kind == 2:
            tensor = torch.zeros([source.randrange(4) for _ in range(source.randrange(4))], dtype=tensor.dtype)
        elif kind == 3:
            tensor = tensor.flatten()[: source.randrange(tensor.numel() + 1)].clone()
        elif kind == 4 and tensor.numel():
            tensor.view(-1)[source.randrange(tensor.numel())] = torch.tensor(source.choice([-1, 0, 7, 1000])).to(tensor.dtype)
        elif kind == 5 and tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[source.randrange(tensor.numel())] = source.choice([float("nan"), float("inf"), -1e4])
        changed[name if kind != 6 else source.choice(["x", "", "a" * 300, "blocks.0.mlp.fc1.weight"])] = tensor.contiguous()
    return changed


@pytest.mark.parametrize("count", COUNTS)
def test_weights_of_a_dense_model_with_any_tensor_changed(tmp_path, count):
    """`--weights`: timm's own filters take names and shapes for granted."""
    torch.manual_seed(0)
    model = load_model(tiny_spec(depth=1))
    state, path = {name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors"

    @fuzz(count, st.lists(change_of(state), min_size=1, max_size=3))
    def check(changes):
        save_file(tampered(state, changes), path)
        accepts_or_refuses(load_weights, model, path)


@pytest.mark.parametrize("count", COUNTS)
def test_checkpoints_with_any_tensor_changed(made, tmp_path, count):
    """The hash is right again, so everything behind it must hold by itself: names, types, shapes and values."""
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    manifest, state = json.loads((folder / "moee.json").read_text()), load_file(folder / "model.safetensors")

    @fuzz(count, st.lists(change_of(state), min_size=1, max_size=3))
    def check(changes):
        changed = tampered(state, changes)
        save_file(changed, folder / "model.safetensors")
        manifest["files"]["model.safetensors"] = sha256_file(folder / "model.safetensors")
        (folder / "moee.json").write_text(json.dumps(manifest))
        if accepts_or_refuses(checkpoint.load, folder):
            with torch.inference_mode():
                assert checkpoint.load(folder).model(torch.zeros(1, 3, 32, 32)).shape == (1, 10), "what loads runs"
