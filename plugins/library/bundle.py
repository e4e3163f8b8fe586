"""A folder that compiles into the plugin on a device with only g++, cmake and TensorRT's headers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from moee.places.output_folder import OutputFolder
from moee.store.artifact import write_manifest
from moee.store.result_kinds import PLUGIN_BUNDLE
from plugins.aot import manifest
from plugins.aot.manifest import Manifest
from plugins.library.build import LIBRARY, SOURCE
from plugins.library.cases import LayerCase
from plugins.library.embed import embed
from plugins.library.selftest import write_selftest
from plugins.targets import target

SCHEMA = "moee.bundle/1"


def write_bundle(
    out_dir: Path, sm: int, kernels_dir: Path, force: bool = False, cases: Sequence[LayerCase] | None = None
) -> Path:
    """Write the bundle for one SM and return its path.

    Holds the C++ sources, the kernels for `sm` (cubins, and PTX for a driver that refuses them), CMakeLists.txt and a
    README; with `cases`, also the self-test in `selftest/`. Raises `UserError` for an SM that `kernels_dir` lacks, or an existing
    `out_dir` without `force`.
    """
    out_dir, kernels_dir = Path(out_dir), Path(kernels_dir)
    kernels = manifest.load(kernels_dir)
    kernels.select([sm])
    with OutputFolder(out_dir, PLUGIN_BUNDLE, force).write() as folder:
        shutil.copytree(SOURCE / "csrc", folder / "csrc")
        for name in ("CMakeLists.txt", "rebuild.cmake"):
            shutil.copy2(SOURCE / name, folder / name)
        embedded = embed(kernels_dir, folder / "generated", [sm])
        _copy_ptx(kernels, folder, embedded.files, sm)
        if cases is not None:
            write_selftest(folder / "selftest", cases)
        text = _README.format(sm=sm, library=LIBRARY, selftest=_SELFTEST if cases is not None else "")
        (folder / "README.md").write_text(text, encoding="utf-8")
        body = {
            **{"sm": sm, "modules": len(embedded.files), "module_bytes": embedded.module_bytes},
            **{key: getattr(kernels, key) for key in ("source_sha256", "triton", "ptxas")},
        }
        write_manifest(folder, "bundle.json", SCHEMA, body)
    return out_dir


def _copy_ptx(kernels: Manifest, folder: Path, files: tuple[str, ...], sm: int) -> None:
    """`ptx/`, and `generated/modules.txt` for rebuild.cmake: of each embedded module its PTX, architecture and kind."""
    assert kernels.folder is not None, "it was loaded"
    sources = {kernel.cubin: kernel.ptx for kernel in kernels.kernels}
    (folder / "ptx").mkdir()
    lines = []
    for name in files:
        kind = "ptx" if name.endswith(".ptx") else "cubin"
        source = name if kind == "ptx" else sources[name]
        stem = Path(source).stem
        shutil.copyfile(kernels.folder / source, folder / "ptx" / f"{stem}.ptx")
        lines.append(f"{stem} {target(sm).arch} {kind}")
    (folder / "generated" / "modules.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


_SELFTEST = """
Are the kernels right on this GPU, and how fast are they? Without TensorRT's library or Python:

    cmake -S selftest -B selftest/build && cmake --build selftest/build -j
    selftest/build/selftest
"""
_README = """# MoeeFfn TensorRT plugin for sm_{sm}

Needs g++ (C++17), cmake 3.16 or later and TensorRT 10.0 or later with its headers. JetPack ships all three
(`apt-get install cmake libnvinfer-headers-dev` if they are missing). No nvcc, Python or Triton.

    cmake -S . -B build
    cmake --build build -j

makes `build/{library}`. If TensorRT lies elsewhere, add `-DTENSORRT_ROOT=/path/to/TensorRT`.
{selftest}
Use it with trtexec:

    trtexec --onnx=tensorrt.onnx --dynamicPlugins=build/{library} --setPluginsToSerialize=build/{library} \\
            --stronglyTyped --saveEngine=moee.plan \\
            --minShapes=input:1x3x224x224 --optShapes=input:8x3x224x224 --maxShapes=input:32x3x224x224
    trtexec --loadEngine=moee.plan --shapes=input:8x3x224x224

(TensorRT 11 has no `--stronglyTyped`: every network is. Leave it out there.)

The kernels are embedded as cubins, and as PTX that the driver compiles if it refuses a cubin. To compile the cubins
with the toolkit on this device instead, for example because its driver is older than the compiler that made them:

    cmake -S . -B build -DMOEE_REBUILD_CUBINS=ON
    cmake --build build -j
"""
