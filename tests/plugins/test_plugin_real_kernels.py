"""The plugin with the kernels that users get: every module loads (as far as the double can tell), every launch matches
the manifest, and a bundle's PTX compiles again with another ptxas."""

import subprocess
from functools import cache
from pathlib import Path

import pytest

from plugins.aot.build import build_kernels
from plugins.aot.cubin import tool
from plugins.library.build import LIBRARY, build_plugin, select_headers
from plugins.library.bundle import write_bundle
from plugins.library.embed import embed
from plugins.targets import OLD, TARGETS
from tests.plugins import built
from tests.plugins.test_plugin_enqueue import TOLERANCE, run_worker

pytestmark = pytest.mark.slow
MIB = 1 << 20


@cache
def kernels() -> Path:
    folder = built.ROOT / "real-kernels"
    build_kernels(folder, (87,))
    return folder


def assert_all_cases(report: dict) -> None:
    assert len(report["cases"]) == 18
    for case in report["cases"]:
        assert case["problems"] == [] and case["log"] == [""]
        assert case["workspace_bytes"] == case["python_workspace_bytes"]
        for result in case["results"]:
            assert result["launches"] == result["expected"] and result["guard_intact"]
            assert result["error"] <= TOLERANCE[case["dtype"]] * max(case["scale"], 1)


def test_real_kernels_run_on_the_double():
    assert_all_cases(run_worker(build_plugin(built.ROOT / "real-plugin", kernels()), kernels()))


def test_library_for_all_sms_stays_small(tmp_path):
    one, without_ptx = (embed(kernels(), tmp_path / name, ptx=name == "one").module_bytes for name in ("one", "bare"))
    assert without_ptx * len(TARGETS) + one - without_ptx < 40 * MIB


def test_bundle_compiles_its_ptx_again(tmp_path):
    folder = write_bundle(tmp_path / "bundle", 87, kernels())
    options = [f"-DTENSORRT_ROOT={select_headers().include}", "-DMOEE_REBUILD_CUBINS=ON", f"-DPTXAS={tool(OLD)}"]
    for command in (["cmake", "-S", ".", "-B", "build", *options], ["cmake", "--build", "build", "-j", "2"]):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert_all_cases(run_worker(folder / "build" / LIBRARY, kernels()))
