"""The operator's libraries that a wheel brings: which one is taken, and that Zig's compiler makes them right."""

import platform
import shutil
import statistics
import time

import onnxruntime as ort
import pytest

from exporter.runners import operator_cache
from moee.errors import MissingDependency
from plugins import reference
from plugins.cpu import build
from plugins.library.build import elf_machine
from tests.plugins import operator_session
from tests.plugins.cases import bound, operator


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A folder as a wheel has it, with the library of this machine."""
    (tmp_path / platform.machine()).mkdir()
    shutil.copy2(operator_session.library(), tmp_path / platform.machine() / build.LIBRARY)
    (tmp_path / build.HASH).write_text(build.source_sha256() + "\n")
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    monkeypatch.setenv("PATH", "")  # no compiler
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_source_tree_brings_no_library():
    assert not build.PREBUILT.exists() and build.prebuilt() == {}


def test_the_library_of_a_wheel_needs_no_compiler(wheel):
    assert operator_cache.ensure_operator() == wheel / platform.machine() / build.LIBRARY
    assert not (wheel / "cache").exists()


@pytest.mark.parametrize("damage", ["other sources", "no hash", "another processor alone"])
def test_a_library_that_does_not_fit_is_not_taken(wheel, damage):
    if damage == "other sources":
        (wheel / build.HASH).write_text("0" * 64 + "\n")
    elif damage == "no hash":
        (wheel / build.HASH).unlink()
    else:
        (wheel / platform.machine()).rename(wheel / {"x86_64": "aarch64"}.get(platform.machine(), "x86_64"))
    with pytest.raises(MissingDependency, match="a C\\+\\+ compiler is not installed"):
        operator_cache.ensure_operator()


def ratio_of_times(library, other) -> float:
    """How much longer the `other` library takes, on one thread. One with narrower vectors takes two to four times as long."""
    given = operator(520, 384, [760] * 8, 1536, "float32")
    graph, x = operator_session.model(given), {"x": given["x"].numpy()}
    sessions = [operator_session.session(graph, 1, each) for each in (library, other)]
    ratios = []
    for _ in range(15):
        times = []
        for session in sessions:
            started = time.process_time()
            session.run(None, x)
            times.append(time.process_time() - started)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


@pytest.mark.slow
def test_zig_compiles_for_both_processors(tmp_path, monkeypatch):
    pytest.importorskip("ziglang")
    libraries = build.write_prebuilt(tmp_path)
    assert [elf_machine(path.read_bytes()) for path in libraries] == list(build.MACHINES)
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    library = build.prebuilt()[platform.machine()]
    assert build.describe_operator(library).api == build.describe_operator(operator_session.library()).api
    for widths in ([133, 1, 202], [70, 80], [20] * 8):
        given = operator(67, 37, widths, 203, "float32")
        graph = operator_session.model(given)
        session: ort.InferenceSession = operator_session.session(graph, operator=library)
        y, expected = session.run(None, {"x": given["x"].numpy()})[0], reference.moee_ffn(given, activation=0)
        assert (abs(y - expected.numpy()) <= bound(expected, "float32").numpy()).all()
    assert 0.7 <= ratio_of_times(library, operator_session.library()), "the same vectors of the processor"
