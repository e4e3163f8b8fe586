"""The plugin library for a set of SMs: kernels compiled ahead of time and the C++ plugin, both kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from moee.errors import StepFailed
from moee.progress import Reporter, silent
from moee.store.cache import cache_dir, cache_lock
from plugins.aot import manifest
from plugins.aot.build import build_kernels, source_sha256
from plugins.aot.compile import GateError
from plugins.devices import known_sms
from plugins.library.build import LIBRARY, SOURCE, build_plugin, select_headers
from plugins.targets import DEFAULT_SMS

DEMO_SMS = (87, 89)  # Jetson Orin and one desktop generation: enough to prove the path in a minute


def ensure_kernels(sms: Iterable[int] | None = None, report: Reporter = silent) -> Path:
    """Folder with `kernels.json` for the SMs (None: all that ship), built if the cache lacks it.

    Raises `UserError` that lists the known SMs for an unknown one, `StepFailed` if a kernel does not compile.
    """
    wanted = known_sms(sms or DEFAULT_SMS)
    name = f"{source_sha256()[:16]}-{'-'.join(map(str, wanted))}"
    folder = cache_dir() / "kernels" / name
    if not (folder / "kernels.json").is_file():
        with cache_lock("kernels", report):  # of any SMs: their kernels share a store
            if not (folder / "kernels.json").is_file():
                _compile(folder, wanted, report)
    manifest.load(folder)
    return folder


def _compile(folder: Path, sms: tuple[int, ...], report: Reporter) -> None:
    try:
        build_kernels(folder, sms=list(sms), progress=lambda done, total, label: report("compile kernels", done, total))
    except GateError as error:
        raise StepFailed(f"compiling the kernels failed: {' '.join(str(error).split())}") from error


def ensure_plugin(sms: Iterable[int] | None = None, report: Reporter = silent) -> Path:
    """Path of the plugin library with kernels for the SMs, compiled if the cache lacks it."""
    kernels = ensure_kernels(sms, report)
    folder = cache_dir() / "plugin" / f"{kernels.name}-{_source_hash()}"
    library = folder / LIBRARY
    if not library.is_file():
        with cache_lock(f"plugin-{folder.name}", report):
            if not library.is_file():
                report("compile plugin", 0, 1)
                build_plugin(folder, kernels)
                report("compile plugin", 1, 1)
    return library


def _source_hash() -> str:
    """Hash of everything that the library is compiled from, TensorRT's headers by their version."""
    digest = hashlib.sha256()
    writers = (SOURCE / "library" / "embed.py", SOURCE / "library" / "tables.py")
    for path in sorted([*(SOURCE / "csrc").rglob("*"), SOURCE / "CMakeLists.txt", *writers]):
        if path.is_file():
            digest.update(path.read_bytes())
    digest.update(select_headers().version.encode())
    return digest.hexdigest()[:16]
