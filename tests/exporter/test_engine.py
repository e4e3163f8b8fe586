"""Real engines, built on the CPU by TensorRT-RTX, and every bad input's sentence."""

import importlib.util
import json

import onnx
import pytest

from exporter.engines import build as engine
from exporter.engines.build import BuildFailed, build_engines, count_plugin_nodes, read_engines, run_worker
from exporter.graph.export import export as export_model
from moee.artifacts.model import MoeeModel
from moee.errors import MissingDependency, UserError
from moee.layers.routed import routed_layers
from moee.methods.recipe import Recipe
from moee.store.artifact import sha256_file
from tests.conftest import tiny_spec
from tests.exporter.graphs import write_export, write_export_manifest
from tests.plugins import built

TINY = {"depth": 2, "dim": 64, "heads": 2, "size": 32, "patch": 8}
EXPERTS = {"experts": 4, "union": 100, "width": 40}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra rtx")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("export") / "x", **TINY, **EXPERTS)


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def tiny(request, tmp_path_factory):
    """Engines of a two-block ViT in one type, the verbose log, and the progress lines."""
    folder = tmp_path_factory.mktemp(request.param)
    write_export(folder / "export", **TINY, **EXPERTS, dtype=request.param)
    lines: list[str] = []
    report = build_engines(
        *(folder / "export", folder / "engine"), plugin=built.plugin(), progress=lines.append, log=folder / "log.txt"
    )
    return request.param, folder, report, lines


def trace(folder) -> list[str]:
    lines = (folder / "log.txt").read_text().splitlines()
    return [line.split("[moee] trace ")[1] for line in lines if "[moee] trace " in line]


class TestTiny:
    def test_folder_holds_engines_plugin_and_manifest(self, tiny):
        _, folder, report, _ = tiny
        made = folder / "engine"
        written = {"dense.plan", "moee.plan", "engine.json", "MODEL_CARD.md", built.plugin().name}
        assert {p.name for p in made.iterdir()} == written
        body = json.loads((made / "engine.json").read_text())
        assert body["schema"] == "moee.engine/1"
        assert body["builder"].startswith("tensorrt-rtx 1.") and "built on" in body["builder"]
        assert body["batch"] == {"min": 1, "opt": 8, "max": 32}
        assert body["plugin"]["sha256"] == sha256_file(built.plugin())
        for name in ("dense", "moee"):
            entry = body["engines"][name]
            assert entry["sha256"] == sha256_file(made / entry["file"])
            assert entry["size_bytes"] == (made / entry["file"]).stat().st_size > 10_000
            assert entry["build_s"] > 0
        assert read_engines(made) == report

    def test_every_routed_layer_became_a_plugin_layer(self, tiny):
        assert tiny[2].plugin_layers == TINY["depth"]

    def test_progress_names_both_engines(self, tiny):
        assert tiny[3][0] == "building dense.plan with tensorrt-rtx"
        assert any(line.startswith("moee: ") for line in tiny[3])

    def test_tensorrt_made_each_call_in_order(self, tiny):
        dtype, folder, _, _ = tiny
        calls = trace(folder)
        created = [c for c in calls if c.startswith("create ")]
        assert created == [
            f"create phase=build name=b{i}.mlp.y activation=gelu top_k=1 max_width=40 load=4" for i in range(TINY["depth"])
        ]
        kinds = [c.split()[0] for c in calls]
        due = ("create", "shapes", "format", "configure", "workspace", "tactics", "serialize")
        order = [kinds.index(k) for k in due]
        assert order == sorted(order)
        assert kinds.count("configure") >= TINY["depth"] and kinds.count("serialize") >= TINY["depth"]
        # 16 tokens an image: opt 8 images, max 32.
        assert f"configure x=[8,16,64] type={dtype} experts=4 union=100 max_width=40" in calls
        assert any(c.startswith("workspace tokens=512 ") for c in calls)
        assert "tactics 1,2,3,4,5,6,7,8,9,10" in calls
        accepted = [c for c in calls if c.startswith("format ") and c.endswith("yes")]
        assert {c.split()[1] for c in accepted} == {f"pos={i}" for i in range(10)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name,dim,heads", [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)])
def test_deit_builds(name, dim, heads, dtype, tmp_path):
    """DeiT-T/S/B at 224 pixels, 16 experts; the MoEE build takes at most 1.2 times the dense one (best of two)."""
    write_export(
        tmp_path / "export", depth=12, dim=dim, heads=heads, size=224, patch=16, dtype=dtype,
        experts=16, union=3 * dim, width=2 * dim,
    )  # fmt: skip
    reports = [build_engines(tmp_path / "export", tmp_path / "engine", plugin=built.plugin(), force=True) for _ in range(2)]
    assert [r.plugin_layers for r in reports] == [12, 12]
    if name == "small":
        assert min(r.moee.build_s for r in reports) <= 1.2 * min(r.dense.build_s for r in reports)


class TestBadInput:
    def build(self, export, tmp_path, **options):
        return build_engines(export, tmp_path / "engine", **{"plugin": built.plugin(), **options})

    def test_profile_that_is_not_ordered(self, export, tmp_path):
        for batch in ((0, 1, 2), (4, 2, 8), (1, 8, 4)):
            with pytest.raises(UserError, match="must satisfy 1 <= min <= opt <= max"):
                self.build(export, tmp_path, batch=batch)

    def test_profile_outside_the_graphs_range(self, export, tmp_path):
        fixed = tmp_path / "fixed"
        fixed.mkdir()
        for name in ("dense.onnx", "tensorrt.onnx"):
            model = onnx.load(export / name)
            model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
            model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
            onnx.save(model, fixed / name)
        write_export_manifest(fixed, 32)
        with pytest.raises(UserError, match="profile 1/8/32 is outside the graph's range.*fixed batch 2"):
            self.build(fixed, tmp_path)
        assert self.build(fixed, tmp_path, batch=(2, 2, 2)).plugin_layers == 2

    def test_graph_without_plugin_nodes(self, export, tmp_path):
        plain = tmp_path / "plain"
        plain.mkdir()
        for name in ("dense.onnx", "tensorrt.onnx"):
            (plain / name).write_bytes((export / "dense.onnx").read_bytes())
        write_export_manifest(plain, 32)
        with pytest.raises(UserError, match="has no MoeeFfn nodes"):
            self.build(plain, tmp_path)

    def test_unreadable_or_missing_graph(self, export, tmp_path):
        broken = tmp_path / "broken"
        broken.mkdir()
        write_export_manifest(broken, 32)
        with pytest.raises(UserError, match="dense.onnx is missing"):
            self.build(broken, tmp_path)
        for name in ("dense.onnx", "tensorrt.onnx"):
            (broken / name).write_bytes(b"\xff\xff no protobuf")
        write_export_manifest(broken, 32)
        with pytest.raises(UserError, match="not a readable ONNX file"):
            self.build(broken, tmp_path)

    def test_missing_or_foreign_plugin(self, export, tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            self.build(export, tmp_path, plugin=tmp_path / "none.so")
        (tmp_path / "old.so").write_bytes(
            built.plugin().read_bytes().replace(b"moee-plugin-headers=10", b"moee-plugin-headers=12")
        )
        with pytest.raises(UserError, match="was built with TensorRT 12"):
            self.build(export, tmp_path, plugin=tmp_path / "old.so")

    def test_plugin_refuses_the_layer(self, export, tmp_path):
        """A layer that the operator does not know is refused before the builder is asked."""
        wrong = tmp_path / "wrong"
        wrong.mkdir()
        (wrong / "dense.onnx").write_bytes((export / "dense.onnx").read_bytes())
        model = onnx.load(export / "tensorrt.onnx")
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "activation":
                    attribute.s = b"swish"
        onnx.save(model, wrong / "tensorrt.onnx")
        write_export_manifest(wrong, 32)
        with pytest.raises(UserError, match="activation .swish.; known are gelu, gelu_tanh, relu, silu, quick_gelu"):
            self.build(wrong, tmp_path)
        assert not (tmp_path / "engine").exists()

    def test_existing_folder_needs_force(self, export, tmp_path):
        (tmp_path / "engine").mkdir()
        with pytest.raises(UserError, match="--force"):
            self.build(export, tmp_path)

    def test_back_ends_that_are_unknown_or_not_installed(self, export, tmp_path, monkeypatch):
        with pytest.raises(UserError, match="unknown back end 'cuda'"):
            self.build(export, tmp_path, backend="cuda")
        monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
        for backend, extra in (("tensorrt-rtx", "rtx"), ("tensorrt", "trt")):
            with pytest.raises(MissingDependency, match=rf"pip install 'moee\[{extra}\]'"):
                self.build(export, tmp_path, backend=backend)

    def test_worker_that_dies_is_reported(self, export, tmp_path, monkeypatch):
        """Without the link for the parser TensorRT-RTX aborts; the parent survives and says so."""
        import os

        monkeypatch.setattr(engine, "library_path", lambda backend, folder: dict(os.environ))
        spec = {"backend": "tensorrt-rtx", "onnx": str(export / "tensorrt.onnx"), "plan": str(tmp_path / "p")}
        with pytest.raises(BuildFailed, match="was killed by SIG|ended with code"):
            run_worker({**spec, "plugin": str(built.plugin()), "batch": [1, 1, 1]}, lambda text: None)


def test_nodes_are_counted_without_reading_weights(export):
    assert count_plugin_nodes(export / "tensorrt.onnx") == 2
    assert count_plugin_nodes(export / "dense.onnx") == 0


def test_model_from_the_exporter_builds(tiny_moee, tmp_path):
    """What `moee export` writes, external weights included, becomes an engine with one plugin layer a routed FFN."""
    model, _, _, config, _ = tiny_moee
    export_model(MoeeModel(model.eval(), tiny_spec(), Recipe.of(config), "tiny"), tmp_path / "export")
    report = build_engines(
        *(tmp_path / "export", tmp_path / "engine"), plugin=built.plugin(), batch=(1, 2, 4), log=tmp_path / "log.txt"
    )
    layers = list(routed_layers(model))
    assert report.plugin_layers == len(layers) == 3
    created = [line for line in trace(tmp_path) if line.startswith("create ")]
    assert [line.split("name=")[1].split()[0] for line in created] == layers
    assert all("load=4" in line for line in created)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_typed_exports_build(tiny_export, tmp_path, precision):
    """What `moee export --precision` writes, dense and MoEE; the plugin sees the token type of the graph."""
    folder = tiny_export.folder(precision)
    report = build_engines(folder, tmp_path / "engine", plugin=built.plugin(), batch=(1, 2, 4), log=tmp_path / "log.txt")
    assert report.plugin_layers == 3
    name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    assert any(f"type={name}" in line for line in trace(tmp_path) if line.startswith("configure "))
    body = json.loads((tmp_path / "engine" / "engine.json").read_text())
    assert body["source_sha256"] == sha256_file(folder / "tensorrt.onnx")
