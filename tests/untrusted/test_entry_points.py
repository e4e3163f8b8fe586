"""Every place that opens an ONNX file, an engine, a library or weights is known here, and is guarded."""

import ast
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporter import cli
from exporter.engines.build import build_engines, count_plugin_nodes
from exporter.manifests import read_engine
from exporter.onnx_safety import check_onnx, load_ir
from exporter.parity import check_parity
from exporter.parity.taps import probe_graph, tapped_graph
from exporter.parity.weights import check_weights
from exporter.passes.raw_pixels import take_raw_pixels
from exporter.runners import EngineRunner, OnnxRunner, check_plugin
from exporter.ship.deployment import write_deployment
from exporter.timing.latency import bench
from exporter.timing.layer_profile import profile_layers
from exporter.verification import verify
from exporter.verification.graph_accuracy import opened
from moee.artifacts import checkpoint
from moee.errors import MissingDependency, UserError
from moee.layers.routed import routed_layers
from tests.conftest import tiny_images
from tests.exporter.conftest import rehash
from tests.exporter.engines import CpuDevice, FakeBinding, write_engine
from tests.plugins import built

ROOT = Path(__file__).resolve().parents[2]
# Functions that hand a file to a parser, an interpreter or the loader, and the modules that may call each, with the reason.
GUARDED = {
    "onnx.load": {
        "exporter/onnx_safety.py": "the check itself",
        "exporter/pretrained.py": "a wheel's file, after its hash",
    },
    "ir.load": {
        "exporter/onnx_safety.py": "after the check",
        "exporter/graph/export.py": "what was written a line before",
        "exporter/graph/runtime_graph.py": "what export.py has just written",
    },
    "register_custom_ops_library": {
        "exporter/runners/operator_cache.py": "compiled here, and its kind was read",
        "exporter/runners/onnx_runtime.py": "what operator_cache gave",
        "exporter/deploy/run.py": "in SHA256SUMS, or compiled on the device by the bundle's own script",
    },
    "ort.InferenceSession": {
        "exporter/runners/onnx_runtime.py": "after the check",
        "exporter/timing/dispatch_bench.py": "a graph made in memory",
    },
    "parser.parse_from_file": {"exporter/engines/worker.py": "build_engines has checked it"},
    "runtime.deserialize_cuda_engine": {"exporter/runners/tensorrt_engine.py": "bytes that were hashed"},
    "load_library": {
        "exporter/runners/tensorrt_engine.py": "after check_plugin",
        "exporter/engines/worker.py": "given by the user with --plugin, or built here",
    },
    "ctypes.CDLL": {
        "exporter/engines/worker.py": "the driver, by its fixed name",
        "moee/store/exchange.py": "the C library, which is loaded already",
        "moee/space/machine.py": "the C library, which is loaded already",
    },
    "torch.load": {"moee/weights/weights_file.py": "with weights_only, the user's checkpoint"},
    "load_file": {"moee/weights/weights_file.py": "read_safetensors", "moee/store/cache.py": "the user's own cache"},
    "json.loads": {
        "moee/schema.py": "parse_json",
        "moee/models/source.py": "of what json.dumps gave a moment ago",
        "moee/artifacts/checkpoint.py": "of what json_text gave a moment ago",
        "moee/parallel/group.py": "messages between the ranks of one run",
        "plugins/aot/build.py": "the user's own cache",
        "exporter/engines/build.py": "lines of our own worker",
        "exporter/engines/worker.py": "written by the parent",
        "exporter/deploy/run.py": "of the bundle that it lies in",
        "exporter/timing/layer_profile.py": "ONNX Runtime's trace of a moment ago",
    },
}
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "torch.package.PackageImporter", "np.load", "numpy.load",
    "joblib.load", "shelve.open", "marshal.loads", "marshal.load", "onnx.load_model", "onnx.load_from_string", "safe_open",
    "json.load", "yaml.load", "eval", "exec", "onnx.load_external_data_for_model", "ir.serde.deserialize_model",
    "ctypes.cdll.LoadLibrary",
}  # fmt: skip


def calls():
    """(module, dotted name) of every call in the packages."""
    for package in ("moee", "exporter", "plugins"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func)


def test_files_are_opened_in_known_places_alone():
    found: dict[str, set[str]] = {name: set() for name in GUARDED}
    for module, name in calls():
        assert name not in FORBIDDEN, f"{module} calls {name}"
        for guarded in GUARDED:
            if name == guarded or name.endswith(f".{guarded}"):
                found[guarded].add(module)
    assert found == {name: set(places) for name, places in GUARDED.items()}


def escape(folder: Path) -> Path:
    """Every graph of an export reads its weights from outside the folder; the hashes are right again."""
    for name in ("dense.onnx", "portable.onnx", "tensorrt.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        for tensor in model.graph.initializer:
            for item in tensor.external_data:
                item.value = f"../{item.value}" if item.key == "location" else item.value
        (folder / name).write_bytes(model.SerializeToString())
    for name in ("dense.data", "moee.data"):
        shutil.copy(folder / name, folder.parent / name)
    rehash(folder)
    return folder


def entered(context):
    with context as value:
        return value


def by_command(*arguments):
    """The command line's exit code 2 as its error."""

    def run(folder, made, out):
        words = [str({"EXPORT": folder, "MODEL": made / "model", "OUT": out}.get(word, word)) for word in arguments]
        if cli.main(words) == 2:
            raise UserError("is refused")

    return run


IMAGES = np.zeros((2, 3, 32, 32), np.float32)
DATA = ("--data", "digits")
ENTRIES = {
    "check_onnx": lambda f, made, out: check_onnx(f / "dense.onnx"),
    "load_ir": lambda f, made, out: load_ir(f / "portable.onnx"),
    "OnnxRunner": lambda f, made, out: entered(OnnxRunner(f / "portable.onnx")),
    "opened": lambda f, made, out: entered(opened(f / "portable.onnx", 1, "cpu", True)),
    "tapped_graph": lambda f, made, out: entered(tapped_graph(f / "portable.onnx", ["blocks.0.mlp"])),
    "probe_graph": lambda f, made, out: entered(probe_graph(f / "portable.onnx", ["blocks.0.mlp"], "fp32")),
    "check_weights": lambda f, made, out: check_weights(f / "tensorrt.onnx", {}, torch.float32),
    "take_raw_pixels": lambda f, made, out: take_raw_pixels(f / "tensorrt.onnx", out, [0.5] * 3, [0.5] * 3),
    "profile_layers": lambda f, made, out: profile_layers(f / "dense.onnx", f / "portable.onnx", ["blocks.0.mlp"], IMAGES, 1),
    "bench": lambda f, made, out: bench(f, 2, runs=1),
    "check_parity": lambda f, made, out: check_parity(f, checkpoint.load(made / "model"), tiny_images(8), sizes=(1,)),
    "verify": lambda f, made, out: verify(f, checkpoint.load(made / "model"), tiny_images(8), sizes=(1,)),
    "count_plugin_nodes": lambda f, made, out: count_plugin_nodes(f / "tensorrt.onnx"),
    "build_engines": lambda f, made, out: build_engines(f, out, plugin=built.plugin()),
    "write_deployment": lambda f, made, out: write_deployment(f, out, 87, built.kernels),
    "moee bench": by_command("bench", "EXPORT", "--runs", "1"),
    "moee verify": by_command("verify", "EXPORT", "--model", "MODEL", *DATA),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_external_data_outside_the_folder_is_refused_everywhere(made, tmp_path, entry, capsys):
    folder = escape(Path(shutil.copytree(made / "export", tmp_path / "export")))
    try:
        with pytest.raises(UserError, match="no name in the file's own folder|is refused"):
            ENTRIES[entry](folder, made, tmp_path / "out")
    except MissingDependency as missing:
        pytest.skip(str(missing))
    if entry.startswith("moee "):
        assert "no name in the file's own folder" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


class Spy(FakeBinding):
    """Counts what is opened."""

    def __init__(self):
        super().__init__()
        self.plans = 0
        inner = self.Runtime

        class Runtime(inner):  # type: ignore[valid-type, misc]
            def deserialize_cuda_engine(runtime, plan):
                self.plans += 1
                return super().deserialize_cuda_engine(plan)

        self.Runtime = Runtime


def _without_manifest(folder):
    (folder / "engine.json").unlink()


def _damaged_manifest(folder):
    (folder / "engine.json").write_text('{"schema": "moee.engine/1"')


def _newer_manifest(folder):
    (folder / "engine.json").write_text((folder / "engine.json").read_text().replace("moee.engine/1", "moee.engine/2"))


def _other_plan(folder):
    (folder / "moee.plan").write_text((folder / "moee.plan").read_text() + "\n")


def _other_library(folder):
    (folder / "libmoee_plugin.so").write_bytes(b"another")


@pytest.mark.parametrize("change", [_without_manifest, _damaged_manifest, _newer_manifest, _other_plan, _other_library])
def test_engines_are_opened_with_a_matching_manifest_or_trust(made, tmp_path, change):
    folder = write_engine(tmp_path / "engine", made / "export")
    spy = Spy()
    with EngineRunner(folder, binding=spy, device=CpuDevice()):
        assert (len(spy.libraries), spy.plans) == (1, 1)
    change(folder)
    if change is _other_plan:  # the double takes a plan for a path
        (folder / "moee.plan").write_text(str(made / "export" / "dense.onnx"))
    spy = Spy()
    with pytest.raises(UserError, match="run moee build again|--trust-engine"):
        EngineRunner(folder, binding=spy, device=CpuDevice()).__enter__()
    assert (len(spy.libraries), spy.plans) == (0, 0), "nothing is opened before everything is checked"
    with EngineRunner(folder, binding=spy, device=CpuDevice(), trust=True) as runner:
        assert (len(spy.libraries), spy.plans) == (1, 1) and runner.run(IMAGES)[0].shape == (2, 10)
    assert check_plugin(folder, trust=True).passed
    if change is _other_library:
        assert not check_plugin(folder).passed


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_the_flag_reaches_the_runner(made, tmp_path, command, capsys):
    """Without a GPU a trusted engine gets as far as the search for one; an untrusted one is refused before."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    folder = write_engine(tmp_path / "engine", made / "export")
    _without_manifest(folder)
    words = [command, str(made / "export"), "--engine", str(folder)]
    words += ["--model", str(made / "model"), *DATA] if command == "verify" else []
    assert cli.main(words) == 2 and "an engine is code, and --trust-engine loads" in capsys.readouterr().err
    assert cli.main([*words, "--trust-engine"]) == 3


@pytest.mark.parametrize("name", ["../moee.plan", "/moee.plan", "sub/moee.plan", "link.plan"])
def test_plans_outside_the_folder_are_refused_even_if_trusted(made, tmp_path, name):
    folder = write_engine(tmp_path / "engine", made / "export")
    (tmp_path / "moee.plan").write_text("secret")
    (folder / "link.plan").symlink_to("../moee.plan")
    text = (folder / "engine.json").read_text().replace('"file": "moee.plan"', f'"file": "{name}"')
    (folder / "engine.json").write_text(text)
    with pytest.raises(UserError, match="expected a file of that folder|leaves its folder"):
        EngineRunner(folder, binding=FakeBinding(), device=CpuDevice()).__enter__()
    if name == "link.plan":
        with pytest.raises(UserError, match="leaves its folder"):
            EngineRunner(folder, binding=FakeBinding(), device=CpuDevice(), trust=True).__enter__()
    else:
        assert read_engine(folder, trust=True)["engines"]["moee"]["file"] == "moee.plan", "what lies there stands in for it"


def test_temporary_copies_leave_the_export_as_it_is(made):
    """A second hard link would make other readers of the same export refuse it meanwhile."""
    folder = made / "export"
    with tapped_graph(folder / "portable.onnx", list(routed_layers(checkpoint.load(made / "model").model))) as path:
        assert path.parent != folder and (folder / "moee.data").stat().st_nlink == 1
        check_onnx(folder / "portable.onnx")
        with OnnxRunner(path, 1) as runner:
            assert runner.run(IMAGES)[0].shape == (2, 10)
