"""Builds one engine in its own process: `python -m exporter.engines.worker SPEC.json PARENT`.

TensorRT may abort the process, and TensorRT-RTX needs a library path that must stand before the process starts; so
`exporter.engines.build` runs this file as a child. One JSON object a line on stdout: `{"progress": ...}` while it runs, and
at the end `{"result": ...}` or `{"error": ..., "kind": "input" | "build" | "disk"}`. Imports nothing but the TensorRT binding.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


class Failed(Exception):
    """Why the build failed; `kind` is `input` for something that the user can change."""

    def __init__(self, text: str, kind: str = "build"):
        super().__init__(text)
        self.kind = kind


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def make_logger(trt: Any, log: Path | None) -> Any:
    """A logger that keeps the errors, and writes everything to `log` if given."""
    handle = open(log, "w", encoding="utf-8") if log else None  # noqa: SIM115 (lives as long as the process)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(text)
            if handle is not None:
                handle.write(f"{severity.name} {text}\n")
                handle.flush()  # an abort must not lose the reason

    return Logger()


def make_monitor(trt: Any) -> Any:
    """Reports the outermost build phases."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                say(progress=f"{name} ({steps} steps)")

        def step_complete(self, name: str, step: int) -> bool:
            return True

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def parse(trt: Any, builder: Any, logger: Any, onnx: str) -> Any:
    """The parsed network, strongly typed: precision is in the graph."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        plugin = [e for e in logger.errors if e.startswith("[moee]")]
        raise Failed(f"{onnx} cannot be parsed: {'; '.join(plugin) or reasons or 'no reason given'}", "input")
    return network


def make_profile(builder: Any, network: Any, spec: dict[str, Any]) -> Any:
    """Profile over the batch; raises if the graph's input does not take it."""
    low, opt, high = spec["batch"]
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if shape[0] != -1 and (low, opt, high) != (shape[0],) * 3:
            raise Failed(
                f"profile {low}/{opt}/{high} is outside the graph's range: input {tensor.name} has the fixed batch "
                f"{shape[0]}; pass {shape[0]} for min, opt and max, or export with a dynamic batch",
                "input",
            )
        if -1 in shape[1:]:
            raise Failed(f"input {tensor.name} has shape {shape}; only its first dimension may be dynamic", "input")
        profile.set_shape(tensor.name, *((n, *shape[1:]) for n in (low, opt, high)))
    return profile


def attach_timing_cache(config: Any, path: Path | None) -> Any:
    """TensorRT's timing cache of the file at `path`, empty if there is none, attached to the builder's configuration."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def device_count() -> int:
    """GPUs that the driver sees; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def build(spec: dict[str, Any]) -> dict[str, Any]:
    """Build one engine as `spec` says, and write it; what was built. Raises `Failed`."""
    trt = importlib.import_module(MODULES[spec["backend"]])
    logger = make_logger(trt, Path(spec["log"]) if spec.get("log") else None)
    builder = trt.Builder(logger)
    if builder is None:
        raise Failed(f"{spec['backend']} cannot make a builder: {'; '.join(logger.errors) or 'no CUDA device'}")
    if spec["plugin"]:
        if builder.get_plugin_registry().load_library(spec["plugin"]) is None:
            raise Failed(f"{spec['plugin']} cannot be loaded: {'; '.join(logger.errors)}", "input")
    network = parse(trt, builder, logger, spec["onnx"])
    plugins = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
    config = builder.create_builder_config()
    config.add_optimization_profile(make_profile(builder, network, spec))
    config.progress_monitor = monitor = make_monitor(trt)  # kept alive: the binding holds no reference
    cache_path = Path(spec["timing_cache"]) if spec.get("timing_cache") else None
    cache = attach_timing_cache(config, cache_path)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    del monitor
    if plan is None:
        raise Failed(f"building {spec['onnx']} failed: {'; '.join(logger.errors[-3:]) or 'no reason given'}")
    Path(spec["plan"]).write_bytes(memoryview(plan))
    if cache is not None and cache_path is not None:
        written = cache_path.with_name(f".{cache_path.name}.{os.getpid()}")  # a kill must not leave half a cache
        written.write_bytes(memoryview(cache.serialize()))
        os.replace(written, cache_path)
    return {
        **{"version": trt.__version__, "build_s": round(seconds, 3), "plugin_layers": plugins},
        **{"layers": network.num_layers, "gpus": device_count()},
    }


def end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when the one that started it dies: an orphan would go on for minutes, for nobody. That may
    have died before: this process has another `parent` then."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:
        os._exit(1)


def main() -> int:
    end_with_parent(int(sys.argv[2]))
    try:
        say(result=build(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    except Failed as error:
        say(error=str(error), kind=error.kind)
        return 1
    except OSError as error:
        say(error=str(error), kind="disk", errno=error.errno, file=error.filename)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
