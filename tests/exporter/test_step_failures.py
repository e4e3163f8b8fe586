"""A compiler or builder that fails: one sentence and exit code 1, never a traceback; the demo keeps what it has."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter import cli
from exporter.engines import plugin_cache
from exporter.engines.build import BuildFailed
from moee.errors import StepFailed
from plugins.aot.compile import GateError
from plugins.library import build


def sentence(capsys) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("moee: ")]
    return line


def test_a_compiler_error_is_one_sentence_with_a_log(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    broken = tmp_path / "cmake"
    broken.write_text("#!/bin/sh\necho 'csrc/plugin.cpp:3:1: error: no such type'\necho 'make: *** stopped' >&2\nexit 2\n")
    broken.chmod(0o755)
    monkeypatch.setattr(build, "find_cmake", lambda: str(broken))
    monkeypatch.setattr(build, "embed", lambda *args: (tmp_path / "out").mkdir(exist_ok=True))
    with pytest.raises(StepFailed, match=r"compiling the plugin failed: csrc.plugin.cpp:3:1: error: no such type \(") as caught:
        build.build_plugin(tmp_path / "out", tmp_path / "kernels")
    assert "\n" not in str(caught.value)
    assert "make: *** stopped" in (tmp_path / "out" / "build.log").read_text()


def test_a_kernel_that_breaks_a_promise_is_one_sentence(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise GateError("fused/0/float16/sm_87 spills 8 bytes,\nstack 0; use a smaller tile")

    monkeypatch.setattr(plugin_cache, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(plugin_cache, "build_kernels", fail)
    assert cli.main(["plugin", "build", "--sm", "87"]) == 1
    assert "compiling the kernels failed: fused/0/float16/sm_87 spills 8 bytes, stack 0" in sentence(capsys)


def test_build_says_why_it_failed(tmp_path, monkeypatch, capsys, tiny_export):
    def fail(*args, **kwargs):
        raise StepFailed("compiling the plugin failed: x.cpp:1: error: y")

    monkeypatch.setattr("exporter.engines.plugin_cache.ensure_plugin", fail)
    monkeypatch.setattr("exporter.engines.build.require_backend", lambda name: None)
    assert cli.main(["build", str(tiny_export.folder()), "--out", str(tmp_path / "x")]) == 1
    assert "compiling the plugin failed" in sentence(capsys)


def test_the_demo_keeps_its_results_when_the_engines_fail(tmp_path, monkeypatch, tiny_export):
    """The engine step is the last: its failure is reported, and the summary says that there is no engine."""
    from exporter import demo
    from exporter.compression.job import Compressed

    def fail(*args, **kwargs):
        raise BuildFailed("the tensorrt-rtx build\nwas killed by SIGABRT")

    monkeypatch.setattr(demo, "Session", lambda *a, **k: None)
    monkeypatch.setattr(demo, "resolve", lambda *a, **k: None)
    made = Compressed(tmp_path / "demo", "static", "extracted", ("accuracy: 1",), 1.0)
    monkeypatch.setattr(demo, "Job", lambda session, place, *a: SimpleNamespace(run=lambda: place.write({"done": True}) or made))
    monkeypatch.setattr(demo, "write_report", lambda *a, **k: None)
    monkeypatch.setattr(demo, "_build", fail)
    monkeypatch.setattr(demo, "_summary", lambda session, compressed, engine: {"engine": engine})
    result = demo.run_demo(tmp_path / "demo")
    assert result.engine_error == "the tensorrt-rtx build was killed by SIGABRT" and result.summary["engine"] is None
    assert (Path(tmp_path) / "demo" / "summary.json").is_file()
