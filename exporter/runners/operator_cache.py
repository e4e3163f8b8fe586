"""The operator's library for ONNX Runtime on the CPU: the wheel's, or compiled once and kept in the cache."""

from __future__ import annotations

import platform
from pathlib import Path

import onnxruntime as ort

from moee.errors import MissingDependency, StepFailed, UserError
from moee.progress import Reporter, silent
from moee.schema import reason_of
from moee.store.cache import cache_dir, cache_lock
from plugins.cpu.build import LIBRARY, build_operator, describe_operator, prebuilt, source_sha256


def ensure_operator(report: Reporter = silent) -> Path:
    """Path of the library: the wheel's for this processor, else the cached one, which is compiled if it is missing.

    Raises `MissingDependency` without a C++ compiler, `StepFailed` if compiling fails, `UserError` if this ONNX Runtime refuses
    the library or the cached one is damaged.
    """
    library = prebuilt().get(platform.machine()) or _compiled(report)
    describe_operator(library)
    try:
        ort.SessionOptions().register_custom_ops_library(str(library))
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise UserError(f"ONNX Runtime refuses the operator library {library} ({reason_of(error)}); delete it") from error
    return library


def _compiled(report: Reporter) -> Path:
    folder = cache_dir() / "operator" / source_sha256()[:16]
    library = folder / LIBRARY
    if not library.is_file():
        with cache_lock(f"operator-{folder.name}", report):
            if not library.is_file():
                report("compile operator", 0, 1)
                build_operator(folder)
                report("compile operator", 1, 1)
    return library


def operator_or_reason(report: Reporter = silent) -> tuple[Path | None, str]:
    """The library, or None and why there is none."""
    try:
        return ensure_operator(report), ""
    except (MissingDependency, StepFailed, UserError, OSError) as error:
        return None, str(error)
