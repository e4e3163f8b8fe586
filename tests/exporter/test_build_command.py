"""`moee build` and `moee plugin` on a small export: results, trtexec's flags, one sentence for bad input."""

import importlib.util
import json

import pytest

from exporter import cli
from exporter.engines import plugin_cache
from exporter.graph.export import export
from exporter.timing.profile import batch_profile
from moee.artifacts.model import MoeeModel
from moee.errors import UserError
from moee.methods.recipe import Recipe
from tests.conftest import tiny_spec
from tests.exporter.test_cli import refused, run
from tests.plugins import built

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra rtx")


@pytest.fixture
def exported(tiny_moee, tmp_path):
    model, _, _, config, _ = tiny_moee
    export(MoeeModel(model.eval(), tiny_spec(), Recipe.of(config), "tiny"), tmp_path / "export")
    return tmp_path / "export"


@needs_rtx
def test_build_writes_both_engines(exported, tmp_path, capsys):
    out = tmp_path / "engine"
    code = run("build", exported, "--plugin", built.plugin(), "--minShapes", "input:1x3x32x32", "--optShapes=4",
               "--max-shapes", "16x3x32x32", "--out", out)  # fmt: skip
    assert code == 0
    body = json.loads((out / "engine.json").read_text())
    assert body["plugin_layers"] == 3 and body["batch"] == {"min": 1, "opt": 4, "max": 16}
    assert (out / "dense.plan").stat().st_size > 0 and (out / "moee.plan").stat().st_size > 0
    assert "3 plugin layers" in capsys.readouterr().out


@needs_rtx
def test_bad_input_is_one_sentence(exported, tmp_path, capsys):
    build = ["build", exported, "--out", tmp_path / "x", "--plugin", built.plugin()]
    assert "outside the graph's range" in refused(capsys, *build, "--maxShapes", "input:8x3x64x64")
    assert "expected min <= opt <= max" in refused(capsys, *build, "--minShapes", "9", "--optShapes", "4")
    assert "cannot be read" in refused(capsys, *build, "--plugin", tmp_path / "absent.so")
    assert "unknown SM 99; expected some of" in refused(capsys, *build[:4], "--sm", "99")
    assert "unknown device 'abacus'; expected some of t4" in refused(capsys, *build[:4], "--sm", "abacus")
    assert "unknown back end" in refused(capsys, *build, "--backend", "openvino")
    assert "a bundle is for one SM" in refused(capsys, "plugin", "bundle", "--sm", "87,89", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_missing_builder_is_exit_code_3(exported, tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorrt_rtx" else real(name, *a))
    code = cli.main(["build", str(exported), "--out", str(tmp_path / "x")])
    assert code == 3 and "pip install 'moee[rtx]'" in capsys.readouterr().err


def test_profiles(exported):
    assert batch_profile(exported, None, None, None) == (1, 8, 32)
    assert batch_profile(exported, None, None, "4") == (1, 4, 4)
    assert batch_profile(exported, "16", None, None) == (16, 16, 32)
    assert batch_profile(exported, None, "64", None) == (1, 64, 64)
    for bad in ("0", "input:axb", "other:1x3x32x32", "1x1x32x32"):
        with pytest.raises(UserError, match="shape"):
            batch_profile(exported, bad, None, None)


def test_the_plugin_is_compiled_once(tmp_path, monkeypatch):
    calls = []

    def compile_once(folder, kernels):
        calls.append(folder)
        folder.mkdir(parents=True)
        (folder / plugin_cache.LIBRARY).write_bytes(b"x")

    monkeypatch.setattr(plugin_cache, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(plugin_cache, "ensure_kernels", lambda sms, report: tmp_path / "kernels-87")
    monkeypatch.setattr(plugin_cache, "build_plugin", compile_once)
    first = plugin_cache.ensure_plugin((87,))
    assert plugin_cache.ensure_plugin((87,)) == first and len(calls) == 1
