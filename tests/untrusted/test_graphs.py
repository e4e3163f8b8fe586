"""ONNX graphs from someone else: external data that escapes or lies, cycles, unknown operators, tables out of order."""

import importlib.util
import json
import os
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from exporter.engines.build import build_engines
from exporter.onnx_safety import check_onnx, load_ir
from exporter.parity.taps import probe_graph, tapped_graph
from exporter.parity.weights import check_weights
from exporter.runners import OnnxRunner
from exporter.ship.contents import graph_tensors
from exporter.ship.deployment import write_deployment
from moee.artifacts import checkpoint
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.store.artifact import sha256_file
from tests.plugins import built
from tests.untrusted import onnx_damage
from tests.untrusted.fuzzing import COUNTS, accepts_or_refuses, fuzz
from tests.untrusted.tables import TABLE_DAMAGE


@pytest.mark.parametrize("change", TABLE_DAMAGE)
def test_expert_tables_of_a_graph(made, tmp_path, change):
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
    (folder / "loop").symlink_to("loop")
    os.link(tmp_path / "secret", folder / "hard")
    (folder / "sub").mkdir()
    (folder / "sub" / "link").symlink_to("..")
    (folder / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (folder / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(bytes(16))
    return folder


@pytest.mark.parametrize(
    "tensor",
    [*map(external, ("../secret", "/etc/passwd", "link", "inside", "folder/secret", "", "a\\..\\b", "pipe", "absent", ".")),
     external("w.data", offset=-4), external("w.data", offset=8), external("w.data", offset="x"), external("w.data", length=12),
     external("w.data", length=2**62, dims=(2**60,)), external("w.data", dims=(-4,)), external("w.data", dims=(2**62, 2**62)),
     external("w.data", dims=(1,) * 20), external("hard"), external("w.data", offset="0x0"), external("w.data", length="1_6"),
     external("w.data", offset=" 0"), external("w.data", basepath="/"), external("w.data", length="9" * 5000),
     external("*/_ORT_MEM_ADDR_/*"), external("folder/../w.data"), external("loop/w.data"), external("x" * 300),
     external("sub/link/w.data"), external("w\n.data")],
    ids=lambda t: f"{t.external_data[0].value} {t.external_data[1].value} {t.external_data[2].value} {list(t.dims)[:3]}",
)  # fmt: skip
def test_external_data_that_escapes_or_lies(graphs, tensor):
    with pytest.raises(UserError, match="is refused"):
        check_onnx(graph_with(tensor, graphs))


@pytest.mark.parametrize("key", ["location", "offset", "length"])
def test_external_data_that_is_placed_twice(graphs, key):
    """One reader takes the first, another the last."""
    tensor = external("w.data")
    tensor.external_data.add(key=key, value={"location": "../secret", "offset": "4", "length": "8"}[key])
    with pytest.raises(UserError, match="says a part of it twice"):
        check_onnx(graph_with(tensor, graphs))


def test_honest_external_data_is_accepted(graphs):
    check_onnx(graph_with(external("w.data"), graphs))
    (graphs / "sub" / "w.data").write_bytes(bytes(32))
    check_onnx(graph_with(external("sub/w.data", offset=16), graphs))


W = numpy_helper.from_array(np.zeros(4, np.float32), "w")
NODE = helper.make_node


def branch(*nodes):
    """An If that takes `nodes`, which make r, either way."""
    value = helper.make_tensor_value_info("r", TensorProto.FLOAT, [4])
    sides = {f"{side}_branch": helper.make_graph(list(nodes), side, [], [value]) for side in ("then", "else")}
    return NODE("If", ["x"], ["y"], **sides)


def test_an_honest_branch_is_accepted(graphs):
    check_onnx(graph_with(W, graphs, [branch(NODE("Add", ["x", "w"], ["r"]))]))
    nested = branch(NODE("Neg", ["x"], ["r"]))
    for _ in range(6):
        nested.output[:] = ["r"]
        nested = branch(nested)
    with pytest.raises(UserError, match="nest too deep|exists already"):
        check_onnx(graph_with(W, graphs, [nested]))


NODES = {
    "a cycle": [NODE("Add", ["x", "b"], ["a"]), NODE("Add", ["a", "w"], ["b"]), NODE("Neg", ["a"], ["y"])],
    "an unknown operator": [NODE("Evil", ["x", "w"], ["y"], domain="com.example")],
    "a foreign MoeeFfn": [NODE("MoeeFfn", ["x", "w"], ["y"], domain="")],
    "a value made twice": [NODE("Add", ["x", "w"], ["y"]), NODE("Neg", ["x"], ["y"])],
    "an output never made": [NODE("Add", ["x", "w"], ["z"])],
    "an operator of no standard": [NODE("EfficientNMS_TRT", ["x", "w"], ["y"])],
    "an operator without its attribute": [NODE("Cast", ["x"], ["y"])],
    "an attribute of another type": [NODE("Cast", ["x"], ["y"], to="float")],
    "too many inputs": [NODE("Neg", ["x", "w"], ["y"])],
    "a sparse tensor": [NODE("Constant", [], ["c"], sparse_value=helper.make_sparse_tensor(
        helper.make_tensor("v", 1, [1], [1.0]), helper.make_tensor("i", 7, [1], [0]), [4])), NODE("Add", ["x", "c"], ["y"])],
    "a loop": [NODE("Loop", ["", "", "x"], ["y"], body=helper.make_graph([], "b", [], []))],
    "a branch with one side": [NODE("If", ["x"], ["y"], then_branch=helper.make_graph([], "b", [], []))],
    "a branch that uses what comes later": [branch(NODE("Neg", ["late"], ["r"])), NODE("Neg", ["x"], ["late"])],
    "a branch that hides a tensor": [branch(NODE("Constant", [], ["r"], value=external("../secret")))],
    "a branch with a loop in it": [branch(NODE("Loop", ["", "", "x"], ["r"], body=helper.make_graph([], "b", [], [])))],
    "a branch that makes a name again": [NODE("Neg", ["x"], ["r"]), branch(NODE("Neg", ["x"], ["r"]))],
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


def accepted(path) -> bool:
    """Whether a graph is accepted; then it must also come through everything that takes graphs apart."""
    if not accepts_or_refuses(check_onnx, path):
        return False
    accepts_or_refuses(load_ir, path)
    accepts_or_refuses(graph_tensors, path)
    return True


@pytest.mark.parametrize("count", COUNTS)
def test_graphs_with_any_field_changed(made, tmp_path, count):
    """Protobuf that is well formed. What passes the check must serve its readers, or be refused by them in one sentence."""
    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))
    models = {name: onnx.load(folder / name, load_external_data=False) for name in ("portable.onnx", "tensorrt.onnx")}
    layers = routed_layers(checkpoint.load(made / "model").model)
    seen = []

    def tap(path):
        with tapped_graph(path, list(layers)), probe_graph(path, list(layers), "fp32"):
            pass

    @fuzz(count, st.sampled_from(sorted(models)), st.integers(0, 2**32), st.integers(1, 4))
    def check(name, seed, changes):
        path = folder / name
        path.write_bytes(onnx_damage.change(models[name], seed, changes).SerializeToString())
        seen.append(accepted(path))
        if seen[-1] and name == "tensorrt.onnx":
            accepts_or_refuses(check_weights, path, layers, torch.float32)
        elif seen[-1]:
            accepts_or_refuses(tap, path)

    assert len(seen) // 20 < sum(seen) < len(seen) * 19 // 20, "some pass, some do not"


@pytest.mark.parametrize("count", [pytest.param(8, id="few"), pytest.param(2000, id="many", marks=pytest.mark.slow)])
def test_onnx_runtime_survives_what_the_check_lets_through(made, tmp_path, count):
    """Each run in a process of its own, so that a crash of the runtime would be seen."""
    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))
    path, model = folder / "portable.onnx", onnx.load(folder / "portable.onnx", load_external_data=False)
    codes = []
    for seed in range(count):
        path.write_bytes(onnx_damage.change(model, seed, 1 + seed % 4).SerializeToString())
        if accepts_or_refuses(check_onnx, path):
            codes.append(in_a_child(run_once, path))
    assert set(codes) <= {0, 2}, "0: ran, 2: refused; anything else: a crash or a traceback"
    assert codes.count(0) > count // 10, "most changes are harmless"


def run_once(path) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # a graph may ask for any memory
    try:
        with OnnxRunner(path, 1) as runner:
            runner.run(np.zeros((1, 3, 32, 32), np.float32))
    except UserError:
        return 2
    return 0


def in_a_child(work, *arguments) -> int:
    """The exit code of `work` in a forked process; negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work(*arguments)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra rtx")


@needs_rtx
@pytest.mark.parametrize("graph", ["dense.onnx", "tensorrt.onnx"])
def test_engines_are_built_from_checked_graphs_alone(made, tmp_path, graph):
    """With hashes that fit: the manifest's author is the attacker."""
    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))
    (tmp_path / "secret").write_bytes((folder / "moee.data").read_bytes())
    model = onnx.load(folder / graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            item.value = "../secret" if item.key == "location" else item.value
    (folder / graph).write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "export.json").read_text())
    manifest["files"][graph] = sha256_file(folder / graph)
    (folder / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no name in the file's own folder"):
        build_engines(folder, tmp_path / "engine", plugin=built.plugin())
    with pytest.raises(UserError, match="no name in the file's own folder"):
        write_deployment(folder, tmp_path / "bundle", 87, built.kernels)
    assert not (tmp_path / "engine").exists() and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["output\ncustom-lib-path=/evil.so", "a b", "$(id)", "x" * 300, "\u202e"])
def test_names_that_would_be_written_into_configurations(made, tmp_path, name):
    """DeepStream's configuration is a line a setting: a name with a line break could name a library to open."""
    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))
    model = onnx.load(folder / "tensorrt.onnx", load_external_data=False)
    old = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [name if value == old else value for value in node.output]
    model.graph.output[0].name = name
    onnx.save(model, folder / "tensorrt.onnx")
    with pytest.raises(UserError, match="holds more than letters, digits"):
        graph_tensors(folder / "tensorrt.onnx")


@needs_rtx
def test_engines_take_no_graph_from_elsewhere(made, tmp_path):
    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))
    manifest = json.loads((folder / "export.json").read_text())
    for name in ("../dense.onnx", "/dense.onnx", 7, None):
        manifest["graphs"]["dense"] = name
        (folder / "export.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="expected a file of that folder|should be a valid string"):
            build_engines(folder, tmp_path / "engine", plugin=built.plugin())
