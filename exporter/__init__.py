"""ONNX export, engines, parity, latency and the command line for routed ViTs.

`compress`, `export`, `verify`, `quick_check`, `bench`, `build` and `bundle` are the Python interface (`exporter.api`).
"""

from typing import TYPE_CHECKING, Any

INTERFACE = ("compress", "export", "verify", "quick_check", "bench", "build", "bundle")

if TYPE_CHECKING:
    from exporter.api import bench as bench
    from exporter.api import build as build
    from exporter.api import bundle as bundle
    from exporter.api import compress as compress
    from exporter.api import export as export
    from exporter.api import quick_check as quick_check
    from exporter.api import verify as verify


def __getattr__(name: str) -> Any:
    """The interface is imported when it is used: importing torch and onnx takes seconds."""
    if name not in INTERFACE:
        raise AttributeError(f"module 'exporter' has no attribute {name!r}")
    from exporter import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *INTERFACE])
