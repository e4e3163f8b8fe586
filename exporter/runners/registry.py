"""Every runtime of ONNX graphs, one line each, by the name that `--provider` gives it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from exporter.runners.base import GraphRunner
from exporter.runners.onnx_runtime import PROVIDERS, OnnxRunner
from moee.errors import chosen

RUNTIMES: dict[str, Callable[[Path, int | None], GraphRunner]] = {  # from a graph and threads (None: all cores) to its runner
    **{name: partial(OnnxRunner, provider=name) for name in PROVIDERS},
}


def graph_runner(path: Path | str, threads: int | None = None, provider: str = "cpu") -> GraphRunner:
    """The runner of a graph by the runtime of a name, to be entered. Raises `UserError` for an unknown name."""
    return chosen(RUNTIMES, provider, "provider")(Path(path), threads)
