"""Files from someone else: whatever a manifest, checkpoint or graph holds, it loads or is refused in one sentence.

Each test of random inputs runs a few of them by default and 10,000 under `slow`.
"""

import json
import os
import random
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from exporter import cli
from exporter.onnx_export import export
from exporter.onnx_safety import check_onnx
from exporter.report import collect, render
from moee import checkpoint
from moee.artifact import read_json, read_manifest, sha256_file
from moee.checkpoint import MoeeModel
from moee.config import make_extract_config
from moee.convert import extract
from moee.errors import UserError
from moee.models import ModelSpec, load_model, read_safetensors
from tests.conftest import tiny_images, tiny_spec

FEW, MANY = 60, 10_000
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(["..", "/etc/passwd", "a\0b", "\ud800", 2**70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6,
)  # fmt: skip


def fuzz(count: int, *strategies):
    """Hypothesis with `count` inputs; the same ones in every run."""

    def decorate(test):
        checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
        settled = settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=checks, database=None)
        settled(given(*strategies)(test))()

    return decorate


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small checkpoint and its export."""
    folder = tmp_path_factory.mktemp("made")
    spec = tiny_spec(depth=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEE_CACHE", str(folder / "cache"))
        model = load_model(spec)
        config = make_extract_config(clustering="kmeans", clusters=3, cluster_tokens=300)
        extract(model, tiny_images(24), config)
    moee = MoeeModel(model.eval(), spec, config, "tiny", None, {"stages": {}, "layers": []})
    checkpoint.save(moee, folder / "model")
    export(moee, folder / "export", source=folder / "model")
    return folder


def accepts_or_refuses(load, *arguments) -> bool:
    """True if it loads. Anything but success and one sentence fails the test."""
    try:
        load(*arguments)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    return True


def places(body, path=()):
    """Every position in a JSON value."""
    yield path
    children = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in children:
        yield from places(value, (*path, key))


def replaced(body, path, value):
    if not path:
        return value
    copy = dict(body) if isinstance(body, dict) else list(body)
    copy[path[0]] = replaced(body[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("count", COUNTS)
def test_manifests_with_any_value_anywhere(made, tmp_path, count):
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    body = json.loads((folder / "moee.json").read_text())
    spots = [p for p in places(body) if p and p[0] != "tools"]

    @fuzz(count, st.sampled_from(spots), JSON)
    def check(spot, value):
        (folder / "moee.json").write_text(json.dumps(replaced(body, spot, value)))
        accepts_or_refuses(checkpoint.load, folder)
        render(collect([folder])) if accepts_or_refuses(collect, [folder]) else None


HUGE = [{"img_size": 10**9}, {"embed_dim": 12288}, {"depth": 10**9}, {"mlp_ratio": 9999.0}, {"img_size": 8192}]


@pytest.mark.parametrize("kwargs", HUGE, ids=str)
def test_a_manifest_cannot_ask_for_a_huge_model(made, tmp_path, kwargs):
    """Refused before any memory is taken: the largest of these would need terabytes."""
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    body = json.loads((folder / "moee.json").read_text())
    body["model"]["kwargs"] |= kwargs
    (folder / "moee.json").write_text(json.dumps(body))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not accepts_or_refuses(checkpoint.load, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


@pytest.mark.parametrize("count", COUNTS)
def test_any_json_as_a_manifest(tmp_path, count):
    @fuzz(count, JSON | st.dictionaries(st.sampled_from(["schema", "files", "layers", "model"]), JSON | st.just("moee.model/1")))
    def check(body):
        (tmp_path / "moee.json").write_text(json.dumps(body))
        accepts_or_refuses(checkpoint.load, tmp_path)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 200_000, b"{" * 10, b'{"a":' * 100_000, b"9" * 10_000, b"\0"])
def test_bytes_that_are_no_json(tmp_path, data):
    (tmp_path / "moee.json").write_bytes(data)
    assert not accepts_or_refuses(read_json, tmp_path / "moee.json") or data == b"9" * 10_000
    assert not accepts_or_refuses(read_manifest, tmp_path, "moee.json", "moee.model/1")


ESCAPES = ["../secret", "/etc/passwd", "a/../../s", "link", "folder/secret", "", "a\0b", "x" * 5000, "loop/x", "pipe", "\ud800"]


@pytest.mark.parametrize("name", ESCAPES, ids=range(len(ESCAPES)))
def test_names_that_leave_the_folder(tmp_path, name):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "link").symlink_to("../secret")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    digest = sha256_file(tmp_path / "secret")
    (folder / "moee.json").write_text(json.dumps({"schema": "moee.model/1", "files": {name: digest}}))
    with pytest.raises(UserError, match="leaves its folder|is missing"):
        read_manifest(folder, "moee.json", "moee.model/1")
    assert "match" not in render(collect([folder])).split("hashes of its files")[1].split("</table>")[0]


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


def swapped(neurons, offsets):
    neurons[[0, 1]] = neurons[[1, 0]]
    return neurons, offsets


def repeated(neurons, offsets):
    neurons[1] = neurons[0]
    return neurons, offsets


def above(neurons, offsets):
    neurons[int(offsets[1]) - 1] = 2**30
    return neurons, offsets


def below(neurons, offsets):
    neurons[0] = -1
    return neurons, offsets


def falling(neurons, offsets):
    offsets[1] = offsets[2] + 1
    return neurons, offsets


def short(neurons, offsets):
    offsets[-1] -= 1
    return neurons, offsets


def none(neurons, offsets):
    return neurons[:0], offsets


TABLE_DAMAGE = [swapped, repeated, above, below, falling, short, none]


@pytest.mark.parametrize("change", TABLE_DAMAGE)
def test_expert_tables_of_a_checkpoint(made, tmp_path, change):
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    with_tables(folder, change)
    assert not accepts_or_refuses(checkpoint.load, folder)


@pytest.mark.parametrize("change", TABLE_DAMAGE)
def test_expert_tables_of_a_graph(made, tmp_path, change):
    import torch

    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))
    model = onnx.load(folder / "tensorrt.onnx")
    node = next(n for n in model.graph.node if n.op_type == "MoeeFfn")
    tensors = {t.name: t for t in model.graph.initializer}
    tables = [tensors[node.input[i]] for i in (7, 8)]
    changed = change(*(torch.from_numpy(numpy_helper.to_array(t).copy()) for t in tables))
    for tensor, value in zip(tables, changed, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(value.numpy(), tensor.name))
    onnx.save(model, folder / "tensorrt.onnx")
    with pytest.raises(UserError, match="offsets do not rise|neuron id|ascend"):
        check_onnx(folder / "tensorrt.onnx")


def graph_with(tensor: TensorProto, folder: Path, nodes=None) -> Path:
    nodes = nodes or [helper.make_node("Add", ["x", "w"], ["y"], "add")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [tensor])
    path = folder / "g.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString())
    return path


def external(location: str, dims=(4,), **keys) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "16", **keys}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.fixture
def graphs(tmp_path):
    folder = tmp_path / "graphs"
    folder.mkdir()
    (folder / "w.data").write_bytes(bytes(16))
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "link").symlink_to("../secret")
    (folder / "inside").symlink_to("w.data")
    (folder / "folder").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    "tensor",
    [*map(external, ("../secret", "/etc/passwd", "link", "inside", "folder/secret", "", "a\\..\\b", "pipe", "absent", ".")),
     external("w.data", offset=-4), external("w.data", offset=8), external("w.data", offset="x"), external("w.data", length=12),
     external("w.data", length=2**62, dims=(2**60,)), external("w.data", dims=(-4,)), external("w.data", dims=(2**62, 2**62)),
     external("w.data", dims=(1,) * 20)],
    ids=lambda t: f"{t.external_data[0].value} {t.external_data[1].value} {t.external_data[2].value} {list(t.dims)[:3]}",
)  # fmt: skip
def test_external_data_that_escapes_or_lies(graphs, tensor):
    with pytest.raises(UserError, match="is refused"):
        check_onnx(graph_with(tensor, graphs))


def test_honest_external_data_is_accepted(graphs):
    check_onnx(graph_with(external("w.data"), graphs))
    (graphs / "sub").mkdir()
    (graphs / "sub" / "w.data").write_bytes(bytes(32))
    check_onnx(graph_with(external("sub/w.data", offset=16), graphs))


W = numpy_helper.from_array(np.zeros(4, np.float32), "w")
NODE = helper.make_node
NODES = {
    "a cycle": [NODE("Add", ["x", "b"], ["a"]), NODE("Add", ["a", "w"], ["b"]), NODE("Neg", ["a"], ["y"])],
    "an unknown operator": [NODE("Evil", ["x", "w"], ["y"], domain="com.example")],
    "a foreign MoeeFfn": [NODE("MoeeFfn", ["x", "w"], ["y"], domain="")],
    "a value made twice": [NODE("Add", ["x", "w"], ["y"]), NODE("Neg", ["x"], ["y"])],
    "an output never made": [NODE("Add", ["x", "w"], ["z"])],
    "a hidden tensor": [NODE("Constant", [], ["c"], value=external("../secret")), NODE("Add", ["x", "w"], ["y"])],
}


@pytest.mark.parametrize("name", NODES)
def test_graphs_that_lie(graphs, name):
    with pytest.raises(UserError, match="is refused"):
        check_onnx(graph_with(W, graphs, NODES[name]))


@pytest.mark.parametrize("count", COUNTS)
def test_graphs_with_any_bytes_changed(made, tmp_path, count):
    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))
    data = (folder / "tensorrt.onnx").read_bytes()

    @fuzz(count, st.integers(0, 2**32), st.integers(1, 40), st.integers(0, len(data)) | st.none())
    def check(seed, changes, length):
        damaged = bytearray(data)
        source = random.Random(seed)
        for _ in range(changes):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        (folder / "tensorrt.onnx").write_bytes(damaged[:length])
        accepts_or_refuses(check_onnx, folder / "tensorrt.onnx")


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """(pickle bytes, the folder that appears if anyone opens them)."""
    pickle = __import__("pickle")
    return pickle.dumps(Canary(tmp_path / "opened")), tmp_path / "opened"


def test_the_canary_sings(canary):
    data, opened = canary
    __import__("pickle").loads(data)
    assert opened.is_dir(), "a canary that never sings proves nothing"


def test_a_pickle_is_never_opened(made, tmp_path, canary, monkeypatch):
    """Under every name and in every place where a file goes in; `torch.load` with its guard off is caught as well."""
    data, opened = canary
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path / "cache"))
    names = ["w.pth", "w.pt", "w.bin", "w.pkl", "w.safetensors", "w.safetensors.pth"]
    for name in names:
        (tmp_path / name).write_bytes(data)
        command = ["extract", "vit_tiny_patch16_224", "--data", "digits", "--weights", tmp_path / name, "--out", tmp_path / "o"]
        assert cli.main(list(map(str, command))) == 2
    for argument in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        spec = ModelSpec(name="x", timm_name="vit_tiny_patch16_224", kwargs={argument: str(tmp_path / "w.pth")})
        assert not accepts_or_refuses(load_model, spec)
    for file in ("model.safetensors", "moee.json", "probe.safetensors"):
        folder = Path(shutil.copytree(made / "model", tmp_path / f"model-{file}"))
        (folder / file).write_bytes(data)
        manifest = json.loads((made / "model" / "moee.json").read_text())
        if file != "moee.json":
            manifest["files"][file] = sha256_file(folder / file)
            (folder / "moee.json").write_text(json.dumps(manifest))
        for command in (["finetune", folder, "--data", "digits"], ["export", folder]):
            assert cli.main([*map(str, command), "--out", str(tmp_path / "o")]) == 2
    for file in ("tensorrt.onnx", "export.json", "moee.data"):
        folder = Path(shutil.copytree(made / "export", tmp_path / f"export-{file}"))
        (folder / file).write_bytes(data)
        for command in (["bundle", "--sm", "87"], ["verify"], ["build", "--plugin", tmp_path / "w.pth"]):
            code = cli.main([*map(str, command), str(folder), "--out", str(tmp_path / "o")])
            assert code in (2, 3), (command, file)
    (tmp_path / "pickle.json").write_bytes(data)
    assert cli.main(["report", str(tmp_path / "pickle.json"), "--out", str(tmp_path / "r.html")]) == 2
    assert not opened.exists(), "a pickle was opened"
