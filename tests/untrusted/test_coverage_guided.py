"""Inputs that look for new paths through the readers: atheris, 10,000 a target."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = 10_000
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", ["manifest", "plan", "checkpoint", "onnx"])
def test_inputs_that_seek_new_paths(made, target):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed; run `pip install -c constraints.txt -e '.[fuzz]'`")
    command = [sys.executable, "-m", "tests.untrusted.atheris_targets", target, str(made)]
    options = [f"-runs={RUNS}", "-seed=1", "-timeout=60", "-rss_limit_mb=4096", "-max_len=200000"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    print("\n".join(done.stderr.splitlines()[-2:]))
    assert re.search(rf"Done {RUNS} runs", done.stderr)
    covered = [int(n) for n in re.findall(r" cov: (\d+)", done.stderr)]
    assert covered[-1] > covered[0], "the first input's paths are not all that was seen"
