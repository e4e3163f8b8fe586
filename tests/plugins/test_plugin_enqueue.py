"""The compiled `enqueue` end to end on the test-double driver, against PyTorch: each tactic, each type, both phases."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from plugins.tactics import TACTICS
from tests.plugins import built

# Bound relative to the largest output: rounding of the hidden activations and of the result.
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def run_worker(plugin: Path, kernels: Path) -> dict:
    """Every case on the test double; see enqueue_worker."""
    command = [sys.executable, "-m", "tests.plugins.enqueue_worker", built.doubles(), plugin, kernels]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@cache
def report() -> dict:
    return run_worker(built.plugin(), built.kernels())


CASES = [f"{d}-{c}" for d in TOLERANCE for c in ("odd", "top2", "build_phase", "one_token", "wide", "many")]


@pytest.mark.parametrize("index", range(len(CASES)), ids=CASES)
class TestEveryTactic:
    def case(self, index: int) -> dict:
        return report()["cases"][index]

    def test_output_matches_pytorch(self, index):
        case = self.case(index)
        assert case["problems"] == []
        assert case["results"], "no tactic ran"
        for result in case["results"]:
            assert result["code"] == 0
            assert result["error"] <= TOLERANCE[case["dtype"]] * max(case["scale"], 1), result["tactic"]

    def test_launches_are_the_tactics_and_few(self, index):
        case = self.case(index)
        for result in case["results"]:
            assert result["launches"] == result["expected"]
            calls = [line.split()[0] for line in result["calls"] if line]
            assert calls == ["cuMemsetD32Async", *["cuLaunchKernel"] * len(result["launches"])]
            assert len(result["launches"]) <= (3 if case["top_k"] == 1 else 4)

    def test_nothing_forbidden_in_a_capture(self, index):
        assert not any("FORBIDDEN" in line for r in self.case(index)["results"] for line in r["calls"])

    def test_workspace_is_as_planned_and_respected(self, index):
        case = self.case(index)
        assert case["workspace_bytes"] == case["python_workspace_bytes"]
        assert all(r["guard_intact"] for r in case["results"])

    def test_everything_is_given_back(self, index):
        case = self.case(index)
        assert case["live_modules"] == 0 and case["live_memory"] == 0 and case["log"] == [""]

    def test_tactics_are_those_that_fit(self, index):
        case = self.case(index)
        sizes = case["sizes"]
        fitting = [t.id for t in TACTICS if t.fits(sizes["tokens"], sizes["dim"], case["top_k"])]
        assert case["tactics"] == fitting


def test_build_phase_routes_by_load():
    """Load 3:1:1:...: the first expert gets three shares of nine, others one each."""
    cases = [c for c in report()["cases"] if c["calibrated"]]
    assert len(cases) == 3
    for result in (r for c in cases for r in c["results"]):
        first, *others = result["shares"]
        assert abs(first - 3 / 9) < 0.1 and all(abs(s - 1 / 9) < 0.1 for s in others)


def test_some_case_leaves_out_each_limited_tactic():
    seen = [set(c["tactics"]) for c in report()["cases"]]
    for tactic in TACTICS:
        assert any(tactic.id in s for s in seen)
        if tactic.max_d or 0 < tactic.max_tokens < 520:
            assert any(tactic.id not in s for s in seen), tactic.name
