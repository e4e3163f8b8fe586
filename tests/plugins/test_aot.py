"""The ahead-of-time build on a CPU: gates, parameter table, manifest, cache; two SMs here, all of them when slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.aot import build, compile, cubin, manifest
from plugins.aot.build import build_kernels
from plugins.aot.compile import GateError, Job
from plugins.aot.manifest import Argument
from plugins.tactics import GEMM_ROLES, TACTICS, VARIANTS
from plugins.targets import DEFAULT_SMS, TARGETS, occupancy, target


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Float16 kernels for Orin and Ada through the user's own cache, and the progress calls of the build."""
    calls = []
    out = tmp_path_factory.mktemp("aot") / "kernels"
    result = build_kernels(out, [87, 89], lambda *a: calls.append(a), dtypes=["float16"])
    return result, out, calls


@pytest.fixture
def store(built, tmp_path_factory):
    """A private copy of the cache entries behind `built`, which a test may damage."""
    store = tmp_path_factory.mktemp("cache")
    for job, _ in build.plan([87, 89], ["float16"]):
        shutil.copytree(build.default_cache() / build.key(job), store / build.key(job))
    return store


def test_every_tactic_is_complete(built):
    result, out, calls = built
    jobs = {job for job, _ in build.plan([87, 89], ["float16"])}
    assert calls[-1][:2] == (len(jobs), len(jobs))
    assert len(result.kernels) == 2 * len(VARIANTS["float16"]) and result.sms == (87, 89)
    loaded = manifest.load(out)
    assert loaded == result
    assert [t.id for t in loaded.tactics] == [t.id for t in TACTICS]
    assert {p.suffix for p in out.iterdir()} == {".json", ".cubin", ".ptx"}


def test_gates_hold_and_are_not_empty(built):
    """No spill, no stack; tensor cores and asynchronous copies in every half-precision GEMM."""
    assert {k.role for k in built[0].kernels} > set(GEMM_ROLES)
    for k in built[0].kernels:
        assert (k.spill_bytes, k.stack_bytes) == (0, 0) and 0 < k.registers <= 255
        assert k.shared_bytes <= target(k.sm).shared_block
        if k.role in GEMM_ROLES:
            assert k.mma_count > 0 and k.cp_async_count > 0, f"{k.role}/{k.variant}"
        assert occupancy(k.sm, k.registers, k.shared_bytes, k.num_warps) >= 1


def test_ptx_is_old_enough_for_the_oldest_driver(built):
    """JetPack 6 begins with CUDA 12.2, whose driver takes PTX up to ISA 8.2 and cubins of a 12.x ptxas."""
    result, out, _ = built
    assert result.ptxas.startswith("12.")
    for k in result.kernels:
        header = (out / k.ptx).read_text()
        assert f".version {k.ptx_version // 10}.{k.ptx_version % 10}" in header and k.ptx_version <= 82
        assert f".target {target(k.sm).arch}" in header
        assert ".file" not in header and "/plugins/" not in header, "no paths of the build machine"
        assert (out / k.cubin).read_bytes()[8] == 7, "ELF ABI version 7 is what CUDA 12 drivers read below sm_100"


def test_the_bundle_can_rebuild_a_cubin_from_its_ptx(built, tmp_path):
    """Plain `ptxas --gpu-name`, as on the device, gives the shipped binary."""
    result, out, _ = built
    k = result.find("expert_up", "bm32", "float16", 87)
    again = tmp_path / "again.cubin"
    subprocess.run([cubin.tool("ptxas"), "--gpu-name=sm_87", str(out / k.ptx), "-o", str(again)], check=True)
    assert cubin.parameters(again) == cubin.parameters(out / k.cubin)
    assert cubin.instructions(again) == cubin.instructions(out / k.cubin)


def test_arguments_follow_the_signature(built):
    k = built[0].find("expert_up", "bm64", "float16", 87)
    names = [a.name for a in k.args]
    assert names[:3] == ["x", "w_up", "b_up"] and names[-2:] == ["global_scratch", "profile_scratch"]
    assert [a.type for a in k.args if a.name in ("dim", "hidden")] == ["ptr", "i32"]
    assert k.grid == ("expert_tiles", "width_tiles", "one") and k.block.model_dump() == {"m": 64, "n": 64, "k": 64}


def test_a_changed_launch_abi_is_caught(built):
    result, out, _ = built
    k = result.find("combine", "sum", "float16", 87)
    table = cubin.parameters(out / k.cubin)
    compile.check_parameters(k.args, table, "combine")
    with pytest.raises(GateError, match="launch ABI changed"):
        compile.check_parameters(k.args[:-1], table, "combine")
    swapped = (Argument(name="tokens", type="i32"), *k.args[1:])
    with pytest.raises(GateError, match="launch ABI changed"):
        compile.check_parameters(swapped, table, "combine")


def test_gates_can_fail(built):
    k = built[0].find("expert_up", "bm64", "float16", 87)
    for change, message in (
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"stack_bytes": 16}, "stack 16"),
        ({"shared_bytes": 200_000}, "the limit is 166912"),
        ({"mma_count": 0}, "no tensor-core instruction"),
    ):
        with pytest.raises(GateError, match=message):
            compile.check_gates(k.model_copy(update=change), target(87))
    compile.check_gates(k.model_copy(update={"mma_count": 0, "dtype": "float32"}), target(87))


def test_the_second_build_comes_from_the_cache(built, store, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("compiled although cached")

    monkeypatch.setattr(build, "compile_into", refuse)
    calls = []
    again = build_kernels(tmp_path / "k", [89], lambda *a: calls.append(a), dtypes=["float16"], cache_dir=store)
    assert len(calls) == 1 and "from cache" in calls[0][2]
    assert again.kernels == tuple(k for k in built[0].kernels if k.sm == 89)
    # A damaged entry is compiled again.
    job = Job("combine", "sum", "float16", 89)
    file = store / build.key(job) / "kernel.cubin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(AssertionError, match="compiled although cached"):
        build_kernels(tmp_path / "k2", [89], dtypes=["float16"], cache_dir=store)
    assert not (tmp_path / "k2").exists() and list(tmp_path.iterdir()) == [tmp_path / "k"], "nothing half-written stays"


def test_a_cold_build_compiles(tmp_path):
    """One small kernel through the whole path, whatever the user's cache holds."""
    job = Job("combine", "sum", "float16", 87)
    assert not build.cached(tmp_path, job)
    build.compile_into(tmp_path, job, build.key(job))
    assert build.read_cache(tmp_path, job).kernel.symbol == "combine_kernel"
    assert [p.name for p in tmp_path.iterdir()] == [build.key(job)]


def test_bad_input(tmp_path, capsys):
    with pytest.raises(ValueError, match="unknown SM 88; known are 75, 80, 86"):
        build_kernels(tmp_path / "k", [88])
    with pytest.raises(ValueError, match="no SM given"):
        build_kernels(tmp_path / "k", [])
    with pytest.raises(ValueError, match="dtypes must be some of"):
        build_kernels(tmp_path / "k", [87], dtypes=["int8"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds thesis.txt and not compiled kernels"):
        build_kernels(tmp_path / "mine", [87])
    assert build.main(["--sm", "12", "--out", str(tmp_path / "k")]) == 2
    assert "unknown SM 12" in capsys.readouterr().err


def test_a_rebuild_replaces_the_folder(built, store, tmp_path):
    out = tmp_path / "k"
    build_kernels(out, [87], dtypes=["float16"], cache_dir=store)
    build_kernels(out, [89], dtypes=["float16"], cache_dir=store)
    assert manifest.load(out).sms == (89,) and not list(out.glob("*sm87*"))
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def broken(data, path, value):
    """Copy of JSON `data` with the entry at `path` replaced, or removed if value is None."""
    data = json.loads(json.dumps(data))
    at = data
    for step in path[:-1]:
        at = at[step]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), "moee.kernels/2", "has schema 'moee.kernels/2', expected 'moee.kernels/1'"),
        (("kernels", 0, "symbol"), None, "kernels.0.symbol: Field required"),
        (("kernels", 0, "symbol"), 'x"; int y = "', "kernels.0.symbol: String should match pattern"),
        (("kernels", 0, "grid"), ["one", "two", "one"], "kernels.0.grid.1: expected one of one, token_tiles"),
        (("kernels", 0, "grid"), ["one", "one"], "kernels.0.grid: Tuple should have at least 3 items"),
        (("kernels", 0, "dtype"), "int8", "kernels.0.dtype: expected one of float32"),
        (("kernels", 0, "dtype"), "any", "listed twice, or without its type"),
        (("kernels", 0, "block"), {"m": 0, "n": 1, "k": 1}, "kernels.0.block.m: Input should be greater than"),
        (("kernels", 0, "cubin"), "../evil", "kernels.0.cubin: expected a plain file name"),
        (("kernels", 0, "args", 0), {"name": "z", "type": "ptr"}, "argument 'z' of type 'ptr' is unknown"),
        (("kernels", 0), None, "needs route/buckets for float16, sm_87, which is not listed"),
        (("tactics", 0, "id"), 2, "positive and unique"),
        (("tactics", 0, "id"), 0, "tactics.0.id: Input should be greater than"),
        (("tactics",), [], "positive and unique"),
    ],
)
def test_a_broken_manifest_is_refused(built, path, value, message):
    data = json.loads((built[1] / "kernels.json").read_text())
    with pytest.raises(ValueError, match=message):
        manifest.parse(broken(data, path, value))


def test_a_missing_or_changed_file_is_refused(built, tmp_path):
    with pytest.raises(ValueError, match="not found; build the kernels first"):
        manifest.load(tmp_path)
    (tmp_path / "kernels.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        manifest.load(tmp_path)
    for file in built[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    victim = tmp_path / built[0].kernels[0].cubin
    victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="has sha256"):
        manifest.load(tmp_path)
    victim.unlink()
    with pytest.raises(ValueError, match="but kernels.json names it"):
        manifest.load(tmp_path)


def test_occupancy_by_hand():
    """128 threads, 128 registers, 32 KiB: registers allow 4 blocks; sm_86 has room for 3 with 1 KiB reserved each."""
    assert occupancy(80, 128, 32 * 1024, 4) == 4
    assert occupancy(86, 128, 32 * 1024, 4) == 3
    assert occupancy(86, 32, 0, 4) == 12
    assert occupancy(90, 255, 0, 8) == 1
    with pytest.raises(ValueError, match="unknown SM"):
        occupancy(99, 1, 1, 1)


def test_target_table():
    """sm_110 alone needs the CUDA 13 assembler; the architecture-specific names begin at sm_90."""
    assert {sm for sm, t in TARGETS.items() if compile.ptxas_version(t.ptxas).startswith("13")} == {110}
    assert target(87).arch == "sm_87" and target(103).arch == "sm_103a"
    assert set(DEFAULT_SMS) == {80, 86, 87, 89, 90, 100, 103, 110, 120, 121}


@pytest.mark.slow
@pytest.mark.parametrize("sm", DEFAULT_SMS)
def test_all_targets_pass_the_gates(sm, tmp_path):
    result = build_kernels(tmp_path / "k", [sm])
    assert len(result.kernels) == 3 * len(VARIANTS["float16"])
    assert manifest.load(tmp_path / "k") == result


@pytest.mark.slow
def test_sm75_builds_without_tensor_cores(tmp_path):
    """Triton 3.4 and later emit no tensor-core instruction for Turing; the kernels are correct but slow there."""
    result = build_kernels(tmp_path / "k", [75])
    assert all(k.mma_count == 0 for k in result.kernels)


@pytest.mark.slow
def test_command_line_in_a_fresh_process(tmp_path):
    command = [sys.executable, "-m", "plugins.aot", "--sm", "87", "--out", str(tmp_path / "k")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "66 kernels for sm 87" in done.stdout


SCRIPT = """
import os, sys
with open(sys.argv[1], "a") as file:
    file.write("once ")
from plugins.aot.pool import FreshProcesses
with FreshProcesses(2) as pool:
    found = {future.result() for future in [pool.submit(os.getpid) for _ in range(4)]}
assert os.getpid() not in found
class Own: pass
assert Own.__module__ == "__main__" and sys.modules["__main__"].Own is Own
"""


def test_a_script_that_has_kernels_compiled_is_not_run_again_by_the_compilers(tmp_path):
    script, told = tmp_path / "mine.py", tmp_path / "told"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(build.__file__).parents[2])}
    subprocess.run([sys.executable, script, told], check=True, timeout=60, env=environment)
    assert told.read_text() == "once "
