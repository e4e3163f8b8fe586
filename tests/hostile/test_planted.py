"""Faults planted in the product are caught: a test that none of them fails would be worth nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.hostile.faults import FAULTS
from tests.reliability.runner import ROOT

PARTS = ("moee", "exporter", "plugins", "tests")
ALONE = {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}  # a --basetemp there would be emptied, and the copy with it


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the product and its tests, where a fault costs nothing."""
    folder = tmp_path_factory.mktemp("planted")
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "build"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_can_be_planted(name):
    """Where it was planted, the source still reads so."""
    fault = FAULTS[name]
    assert (ROOT / fault.file).read_text().count(fault.old) >= 1, f"{fault.file} no longer holds {fault.old!r}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(copy, name, tried):
    fault = FAULTS[name]
    path = copy / fault.file
    before = path.read_text()
    path.write_text(before.replace(fault.old, fault.new, 1))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", fault.where, "-k", fault.choice],
            cwd=copy, capture_output=True, text=True, env={**os.environ, **ALONE, "PYTHONPATH": str(copy)},
        )  # fmt: skip
    finally:
        path.write_text(before)
    assert done.returncode == 1, f"not caught (pytest ended with {done.returncode}): {done.stdout[-2000:]}"
    tried("planted faults", name, "caught")
