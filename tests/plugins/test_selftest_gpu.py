"""The self-test on a real GPU: right, and faster than dense. On the CPU test_selftest.py runs it on the driver double."""

import json
import subprocess

import pytest
import torch

from plugins.aot.build import build_kernels
from plugins.library.build import build_plugin
from plugins.library.cases import stand_in, write_cases
from plugins.library.selftest import build_selftest
from tests.plugins import built

pytestmark = pytest.mark.gpu


def test_kernels_are_right_and_faster_than_dense_on_this_gpu(capsys):
    """Every tactic, type and case; then a layer of DeiT-S's sizes with half the MACs. Prints the tables."""
    major, minor = torch.cuda.get_device_capability()
    folder = built.ROOT / f"gpu-{major}{minor}"
    build_kernels(folder / "kernels", (10 * major + minor,))
    plugin = build_plugin(folder / "plugin", folder / "kernels")
    program = build_selftest(folder / "selftest", folder / "plugin" / "generated")
    cases, out = write_cases(folder / "cases.bin", [stand_in()]), folder / "selftest.json"
    command = [str(program), "--plugin", str(plugin), "--cases", str(cases), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    with capsys.disabled():
        print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert max(timing["ratio"] for timing in json.loads(out.read_text())["timing"]) > 1
