"""Registration: a plain dlopen (trtexec --staticPlugins) registers, loadLibrary (--dynamicPlugins) does not clash."""

import json
import subprocess
import sys

import pytest

from tests.plugins import built
from tests.plugins.build_doubles import build_nvinfer

# In a child process, because a library cannot be unloaded for certain.
SCRIPT = """
import ctypes, json, sys
nvinfer = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_LOCAL)
nvinfer.fake_lines.restype = ctypes.c_char_p
state = {"before": nvinfer.fake_creators()}
if sys.argv[3] == "static":
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_LOCAL)
    state["after"] = nvinfer.fake_creators()
state["loaded"] = nvinfer.fake_load_library(sys.argv[2].encode())
state["end"] = nvinfer.fake_creators()
state["lines"] = nvinfer.fake_lines().decode()
print(json.dumps(state))
"""


def state(folder, how: str, *options: str) -> dict:
    library = build_nvinfer(folder, *options)
    command = [sys.executable, "-c", SCRIPT, str(library), str(built.plugin()), how]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # destructors at exit included
    return {**json.loads(done.stdout), "stderr": done.stderr}


def test_plain_dlopen_registers_and_hands_over_to_load_library(tmp_path):
    found = state(tmp_path, "static")
    assert (found["before"], found["after"]) == (0, 1)
    assert found["loaded"] and found["end"] == 1  # TensorRT refuses a library whose creator is registered already


def test_load_library_alone(tmp_path):
    found = state(tmp_path, "dynamic")
    assert found["loaded"] and found["end"] == 1


@pytest.mark.parametrize("major", [9, 99])
def test_another_major_version_is_left_alone_and_named(tmp_path, major):
    found = state(tmp_path, "static", f"-DFAKE_MAJOR={major}")
    assert found["after"] == 0  # its registry may be laid out differently
    assert "another major version is loaded: use --dynamicPlugins" in found["stderr"]
    assert found["lines"] == ""
