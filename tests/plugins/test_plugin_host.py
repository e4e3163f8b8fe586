"""The host program: creator, formats, shapes, serialisation, devices and driver errors, under ASan and UBSan."""

import os
import subprocess

import pytest

from tests.plugins import built

OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def run(*arguments: str, library_path: str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, **OPTIONS, "LD_LIBRARY_PATH": library_path}
    return subprocess.run([built.host(), *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_host_passes_under_the_sanitizers():
    done = run(library_path=str(built.doubles()))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.endswith("0 checks failed\n")


def test_host_without_a_driver():
    try:
        import ctypes

        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has a driver")
    except OSError:
        pass
    done = run("without-driver")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
