"""One warm process a session; without a C compiler there are no faults to inject."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.reliability import faults
from tests.reliability.runner import ROOT, Zygote

RECORDS = ROOT / "build" / "reliability"


def _zygote(tmp_path_factory, *parts):
    if sys.platform != "linux" or faults.compiler() is None:
        pytest.skip("fault injection needs Linux and a C compiler")
    zygote = Zygote(tmp_path_factory.mktemp("zygote"), *parts)
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    """Everything imported but torch's tracer."""
    yield from _zygote(tmp_path_factory)


@pytest.fixture(scope="session")
def tracing_zygote(tmp_path_factory):
    """The tracer imported too: for the commands that need an export."""
    yield from _zygote(tmp_path_factory, "trace")


@pytest.fixture(scope="session")
def record():
    """Keep a figure for docs/reliability.md: `build/reliability/NAME.json`."""

    def write(name: str, figures: dict) -> None:
        RECORDS.mkdir(parents=True, exist_ok=True)
        (RECORDS / f"{name.replace(' ', '-')}.json").write_text(json.dumps(figures, indent=2) + "\n")

    return write


@pytest.fixture
def place():
    """A folder that no other user is kept from; pytest makes the parents of its own private again at every start."""
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
