"""What the plugin tests share: compiled once a session, kept in `build/` so that a second run compiles only changes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from plugins.library.build import build_plugin
from tests.plugins.build_doubles import CSRC, build_driver
from tests.plugins.synthetic import write_kernels

ROOT = Path(__file__).resolve().parent.parent.parent / "build" / "test-plugin"


@cache
def kernels() -> Path:
    """A synthetic kernel folder for sm_80 and sm_87."""
    return write_kernels(ROOT / "kernels")


@cache
def plugin() -> Path:
    """The plugin library with the synthetic kernels."""
    return build_plugin(ROOT / "plugin", kernels())


@cache
def doubles() -> Path:
    """The folder with the test-double driver, whose kernels do not run."""
    build_driver(ROOT / "doubles")
    return ROOT / "doubles"


@cache
def host() -> Path:
    """The host program, sanitized."""
    build_plugin(ROOT / "host", kernels(), sanitize=True, host=sorted(CSRC.glob("host_*.cpp")))
    return ROOT / "host" / "build" / "moee_host"
