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
from plugins.library.selftest import build_selftest, read_selftest
from plugins.targets import OLD, TARGETS
from tests.plugins import built, selftest_double
from tests.plugins.build_doubles import build_device

pytestmark = pytest.mark.slow
MIB = 1 << 20


@cache
def kernels() -> Path:
    folder = built.ROOT / "real-kernels"
    build_kernels(folder, (87,))
    return folder


def run_all(plugin: Path, tables: Path, out: Path, modules: Path | None = None) -> None:
    """The self-test with these kernels on a double that knows them: every module is read, every launch is one of the tables'."""
    program = build_selftest(out / "selftest", tables)
    driver = build_device(out / "device", tables, modules).parent
    done = selftest_double.run(
        out / "selftest.json", "--check-only", "--plugin", str(plugin), program_=program, library_path=driver
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert read_selftest(out / "selftest.json").passed


def test_real_kernels_run_on_the_double(tmp_path):
    plugin = build_plugin(built.ROOT / "real-plugin", kernels())
    run_all(plugin, plugin.parent / "generated", tmp_path)


def test_library_for_all_sms_stays_small(tmp_path):
    one, without_ptx = (embed(kernels(), tmp_path / name, ptx=name == "one").module_bytes for name in ("one", "bare"))
    assert without_ptx * len(TARGETS) + one - without_ptx < 40 * MIB


def test_bundle_compiles_its_ptx_again(tmp_path):
    folder = write_bundle(tmp_path / "bundle", 87, kernels())
    options = [f"-DTENSORRT_ROOT={select_headers().include}", "-DMOEE_REBUILD_CUBINS=ON", f"-DPTXAS={tool(OLD)}"]
    for command in (["cmake", "-S", ".", "-B", "build", *options], ["cmake", "--build", "build", "-j", "2"]):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    rebuilt = folder / "build" / "rebuilt" / "modules.cpp"
    run_all(folder / "build" / LIBRARY, folder / "generated", tmp_path, rebuilt)
