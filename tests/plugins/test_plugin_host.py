"""The host program: creator, formats, shapes, serialisation, devices and driver errors, under ASan and UBSan."""

import os
import subprocess

import pytest

from tests.plugins import built

OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def run(*arguments: str, library_path: str = "", timeout: int = 120) -> subprocess.CompletedProcess:
    environment = {**os.environ, **OPTIONS, "LD_LIBRARY_PATH": library_path}
    return subprocess.run([built.host(), *arguments], capture_output=True, text=True, env=environment, timeout=timeout)


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


FUZZ = [pytest.param(300, id="few"), pytest.param(10_000, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


@pytest.mark.parametrize("count", FUZZ)
def test_random_input_gives_no_sanitizer_report(count):
    """Fields, descriptions, damaged serialised bytes and whole lives with a failing driver: `count` of each."""
    done = run("fuzz", "0", str(count), library_path=str(built.doubles()), timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    first, last = done.stdout.splitlines()
    assert first.startswith(f"{count} inputs of each kind, ") and last == "0 checks failed"
    assert count // 20 < int(first.split(", ")[1].split()[0]) < count, "some field lists are right, and not all"
