"""The built library: exports, dependencies, every header set, what it says of itself; the bundle."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from moee.errors import MissingDependency, UserError
from plugins.library import build
from plugins.library.bundle import write_bundle
from plugins.library.embed import embed
from tests.plugins import built

FIRST = build.select_headers()


def tool_output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_library_exports_only_the_two_entry_points():
    lines = tool_output("nm", "-D", "--defined-only", str(built.plugin())).splitlines()
    assert {line.split()[-1] for line in lines} == {"getCreators", "setLoggerFinder"}


def test_library_depends_on_neither_cuda_nor_tensorrt():
    lines = tool_output("readelf", "-d", str(built.plugin())).splitlines()
    needed = {line.split("[")[1].split(".so")[0] for line in lines if "(NEEDED)" in line}
    assert needed <= {"libstdc++", "libgcc_s", "libm", "libc", "libdl", "libpthread"}
    undefined = tool_output("nm", "-D", "--undefined-only", str(built.plugin()))
    assert " cu" not in undefined and "nvinfer" not in undefined and "getPluginRegistry" not in undefined


@pytest.mark.parametrize("headers", build.find_headers(), ids=lambda h: h.version)
def test_compiles_against_every_header_set(headers, tmp_path):
    if headers == FIRST:
        assert build.describe_plugin(built.plugin()).headers == ".".join(headers.version.split(".")[:2])
        return  # compiled for the other tests
    library = build.build_plugin(tmp_path, built.kernels(), [87], tensorrt_root=headers.include)
    assert build.describe_plugin(library).headers == ".".join(headers.version.split(".")[:2])


def header_folder(folder: Path, version: str) -> Path:
    major, minor, patch = version.split(".")
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").write_text("")
    numbers = {"MAJOR": f"{major} //!< major", "MINOR": minor, "PATCH": patch}
    lines = [f"#define NV_TENSORRT_{name} {value}\n" for name, value in numbers.items()]
    (folder / "NvInferVersion.h").write_text("".join(lines))
    return folder


def test_headers_of_tensorrt_root_come_first(tmp_path, monkeypatch):
    header_folder(tmp_path / "include", "10.3.0")
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    assert build.select_headers() == build.Headers(tmp_path / "include", "10.3.0")


@pytest.mark.parametrize("version", ["8.6.1", "12.0.0"])
def test_headers_of_another_major_version_are_refused(tmp_path, version):
    header_folder(tmp_path / "include", version)
    with pytest.raises(UserError, match=rf"holds TensorRT {version}'s headers; the plugin needs 10.0 to 11.x"):
        build.select_headers(tmp_path)


def test_compiler_refuses_old_headers_too(tmp_path):
    folder = header_folder(tmp_path / "include", "8.6.1")
    source = build.SOURCE / "csrc" / "tensorrt" / "registration.cpp"
    command = ["c++", "-std=c++17", "-E", f"-I{folder}", f"-I{build.SOURCE / 'csrc'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "MoeeFfn needs the headers of TensorRT 10.0" in done.stderr


def test_missing_headers_name_the_ways_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "header_candidates", lambda: [tmp_path])
    with pytest.raises(MissingDependency, match="set TENSORRT_ROOT"):
        build.select_headers()
    with pytest.raises(UserError, match="no NvInferRuntime.h in"):
        build.select_headers(tmp_path)


def test_missing_tools_name_their_package(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_cmake", lambda: None)
    with pytest.raises(MissingDependency, match="apt-get install cmake"):
        build.build_plugin(tmp_path, built.kernels())


def test_describe_refuses_what_is_no_plugin_for_this_machine(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        build.describe_plugin(tmp_path / "none.so")
    text = tmp_path / "text.so"
    text.write_text("moee-plugin-headers=10.14")
    with pytest.raises(UserError, match="not a MoeeFfn plugin library"):
        build.describe_plugin(text)
    data = bytearray(built.plugin().read_bytes())
    other = 183 if struct.unpack_from("<H", data, 18)[0] == 62 else 62
    for machine, name in ((other, "was built for"), (8, "ELF machine 8")):
        struct.pack_into("<H", data, 18, machine)
        (tmp_path / "foreign.so").write_bytes(data)
        with pytest.raises(UserError, match=name):
            build.describe_plugin(tmp_path / "foreign.so")
    old = built.plugin().read_bytes().replace(b"moee-plugin-headers=10", b"moee-plugin-headers=12")
    (tmp_path / "old.so").write_bytes(old)
    with pytest.raises(UserError, match="was built with TensorRT 12"):
        build.describe_plugin(tmp_path / "old.so")


def test_embedding_one_sm_leaves_the_others_out(tmp_path):
    both = embed(built.kernels(), tmp_path / "both")
    one = embed(built.kernels(), tmp_path / "one", [87])
    assert both.sms == (80, 87) and one.sms == (87,)
    assert one.module_bytes < both.module_bytes
    assert all("sm87" in name for name in one.files)
    assert any(name.endswith(".ptx") for name in one.files)
    bare = embed(built.kernels(), tmp_path / "bare", [87], ptx=False)
    assert not any(name.endswith(".ptx") for name in bare.files)


def test_modules_lie_as_they_are_on_boundaries_with_a_zero_behind(tmp_path):
    """The driver reads them where they lie: a cubin is an ELF file, PTX is text."""
    embedded = embed(built.kernels(), tmp_path)
    blob = (tmp_path / "kernels.bin").read_bytes()
    offsets = [int(at) for at in re.findall(r"moee_blob \+ (\d+),", (tmp_path / "modules.cpp").read_text())]
    assert len(offsets) == len(embedded.files)
    contents = [(built.kernels() / name).read_bytes() for name in embedded.files]
    for at, content in zip(offsets, contents, strict=True):
        assert at % 16 == 0 and blob[at : at + len(content) + 1] == content + b"\0"
    assert sum(map(len, contents)) == embedded.module_bytes


def test_embedding_again_touches_no_file(tmp_path):
    embed(built.kernels(), tmp_path, [87])
    before = {f.name: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    embed(built.kernels(), tmp_path, [87])
    assert before == {f.name: f.stat().st_mtime_ns for f in tmp_path.iterdir()}


@pytest.fixture
def kernels_copy(tmp_path):
    """A small kernel folder to damage, and a function that rewrites its manifest."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    manifest = json.loads((built.kernels() / "kernels.json").read_text())
    manifest["tactics"] = [tactic for tactic in manifest["tactics"] if tactic["name"] == "masked16"]
    manifest["kernels"] = [
        kernel for kernel in manifest["kernels"]
        if kernel["sm"] == 80 and kernel["dtype"] == "float16" and kernel["variant"] in ("members", "bm16")
        and kernel["role"].startswith(("route", "masked"))
    ]  # fmt: skip
    for kernel in manifest["kernels"]:
        for key in ("cubin", "ptx"):
            shutil.copy(built.kernels() / kernel[key], folder)

    def write(**changes):
        (folder / "kernels.json").write_text(json.dumps({**manifest, **changes}))
        return folder

    write()
    return folder, manifest, write


def test_embed_refuses_bad_kernel_folders(kernels_copy, tmp_path):
    folder, manifest, write = kernels_copy
    kernel, tactic = manifest["kernels"][0], manifest["tactics"][0]

    def refused(match, sms=None, **changes):
        with pytest.raises(UserError, match=match):
            embed(write(**changes), tmp_path / "out", sms)

    refused("no kernels for sm_99; built are: sm_80", [99])
    refused("no kernels for any SM", [])
    refused("schema 'other'", schema="other")
    refused("type: Input should be 'ptr', 'i32' or 'scratch_ptr'", kernels=[{**kernel, "args": [{"name": "x", "type": "f32"}]}])
    refused("argument 'z' of type 'ptr' is unknown", kernels=[{**kernel, "args": [{"name": "z", "type": "ptr"}]}])
    refused("argument 'x' of type 'i32' is unknown", kernels=[{**kernel, "args": [{"name": "x", "type": "i32"}]}])
    refused("expected one of one, token_tiles", kernels=[{**kernel, "grid": ["rows", "one", "one"]}])
    refused("expected one of float32", kernels=[{**kernel, "dtype": "int8"}])
    refused("expected a plain file name", kernels=[{**kernel, "cubin": "../x.cubin"}])
    refused("is missing", kernels=[{**kernel, "cubin": "none.cubin"}, *manifest["kernels"][1:]])
    refused("String should match pattern", kernels=[{**kernel, "symbol": 'x"; int y = "'}])
    refused("positive and unique", tactics=[tactic, tactic])
    refused("greater than or equal to 1", tactics=[{**tactic, "id": 0}])
    refused("masked16 needs masked_down/bm16 for float16, sm_80", kernels=manifest["kernels"][:-1])
    (folder / "kernels.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        embed(folder, tmp_path / "out")
    with pytest.raises(UserError, match="not found"):
        embed(tmp_path, tmp_path / "out")


def test_bundle_compiles_in_an_empty_folder_without_python_or_cuda(tmp_path):
    folder = write_bundle(tmp_path / "bundle", 87, built.kernels())
    assert {p.name for p in folder.iterdir()} == {
        *("CMakeLists.txt", "README.md", "bundle.json", "csrc", "generated", "ptx", "rebuild.cmake")
    }
    assert not list(folder.rglob("*.py"))
    moved = tmp_path / "elsewhere" / "bundle"
    moved.parent.mkdir()
    folder.rename(moved)
    path = tmp_path / "bin"  # nothing else is reachable
    path.mkdir()
    for name in "cmake c++ g++ make ninja as ld ar ranlib nm objdump readelf strip uname".split():
        if (found := shutil.which(name)) is not None:
            (path / name).symlink_to(found)
    root = build.select_headers().include
    # Unoptimised, because it compiles faster; without the CUDA toolkit's headers.
    options = [f"-DTENSORRT_ROOT={root}", "-DCMAKE_BUILD_TYPE=Debug", f"-DCUDA_INCLUDE={moved}/csrc/compat"]
    options.append(f"-DCMAKE_CXX_COMPILER={path}/c++")
    environment = {"PATH": str(path)}
    for command in (["cmake", "-S", ".", "-B", "build", *options], ["cmake", "--build", "build", "-j", "2"]):
        done = subprocess.run(command, cwd=moved, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    library = moved / "build" / build.LIBRARY
    assert build.describe_plugin(library).machine == os.uname().machine


def test_bundle_refuses_unknown_sm_and_existing_folder(tmp_path):
    with pytest.raises(UserError, match="no kernels for sm_99"):
        write_bundle(tmp_path / "a", 99, built.kernels())
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="--force"):
        write_bundle(tmp_path / "b", 87, built.kernels())
    assert (write_bundle(tmp_path / "b", 87, built.kernels(), force=True) / "bundle.json").is_file()


def test_cmake_alone_can_choose_the_sm(tmp_path):
    command = [
        *("cmake", "-S", str(build.SOURCE), "-B", str(tmp_path), "-DMOEE_SM=87", f"-DMOEE_KERNELS={built.kernels()}"),
        *(f"-DPython3_EXECUTABLE={sys.executable}", f"-DTENSORRT_INCLUDE={FIRST.include}"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert {p.name for p in (tmp_path / "generated").iterdir()} == {"tables.cpp", "modules.cpp", "kernels.bin"}
    command[5] = "-DMOEE_SM=99"
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode and "plugins.library.embed:" in failed.stderr
