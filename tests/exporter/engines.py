"""Engine folders without TensorRT, and doubles of its binding and of a GPU for the runner's tests."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import torch

from exporter.belonging import export_ids
from exporter.engines.build import SCHEMA
from moee.store.artifact import read_json, sha256_file, write_manifest

LIBRARY = "libmoee_plugin.so"


def write_engine(folder: Path, export: Path, batch: tuple[int, int, int] = (1, 2, 4)) -> Path:
    """A folder as `moee build` writes it; the "plans" are paths of the graphs, which `FakeBinding` runs."""
    folder.mkdir()
    (folder / LIBRARY).write_bytes(b"a plugin")
    for name, graph in (("dense", "dense.onnx"), ("moee", "portable.onnx")):
        (folder / f"{name}.plan").write_text(str(export / graph))
    plans = {
        name: {"file": f"{name}.plan", "sha256": sha256_file(folder / f"{name}.plan"), "size_bytes": 1, "build_s": 1.0}
        for name in ("dense", "moee")
    }
    body = {
        "builder": "tensorrt-rtx 1.0 (built on CPU)",
        "target": "a double",
        "batch": dict(zip(("min", "opt", "max"), batch, strict=True)),
        "plugin": {"file": LIBRARY, "sha256": sha256_file(folder / LIBRARY), "headers": "10.14"},
        "plugin_layers": 3,
        "source_sha256": sha256_file(export / "tensorrt.onnx"),
        "belongs_to": export_ids(read_json(export / "export.json")),
        "engines": plans,
    }
    write_manifest(folder, "engine.json", SCHEMA, body)
    return folder


class CpuDevice:
    """Host memory in the place of the GPU's; counts what the runner asks for."""

    def __init__(self) -> None:
        self.synchronized = self.captured = 0

    def upload(self, images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images.copy())

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.full(shape, float("nan"))

    def stream(self) -> int:
        return 7

    def synchronize(self) -> None:
        self.synchronized += 1

    def capture(self, work):
        self.captured += 1
        return work


class _Context:
    def __init__(self, session: ort.InferenceSession, largest: int):
        self.session, self.largest = session, largest
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= self.largest

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], self.session.get_outputs()[0].shape[1])

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7

        def view(name: str, shape: tuple[int, ...]) -> np.ndarray:
            size = int(np.prod(shape))
            return np.ctypeslib.as_array((ctypes.c_float * size).from_address(self.addresses[name])).reshape(shape)

        (y,) = self.session.run(None, {"input": view("input", self.shape)})
        view("output", y.shape)[:] = y
        return True


class FakeBinding:
    """As much of TensorRT's Python binding as the runner uses; an engine is an ONNX Runtime session."""

    __version__ = "1.0"
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")

    class Logger:
        WARNING = 1

        def __init__(self, level: int):
            self.level = level

    def __init__(self, largest: int = 4, accepts: bool = True, plugin: bool = True):
        self.libraries: list[str] = []
        binding = self

        class Runtime:
            def __init__(self, logger: object):
                pass

            def get_plugin_registry(self):
                def load_library(path: str):
                    binding.libraries.append(path)
                    return object() if accepts else None

                return SimpleNamespace(load_library=load_library)

            def deserialize_cuda_engine(self, plan: bytes):
                assert binding.libraries or not plugin or b"dense" in plan, "the plugin must be loaded before the plan"
                session = ort.InferenceSession(plan.decode(), providers=["CPUExecutionProvider"])
                names = ["input", "output"]
                return SimpleNamespace(
                    num_io_tensors=2,
                    get_tensor_name=lambda i: names[i],
                    create_execution_context=lambda: _Context(session, largest),
                    get_tensor_mode=lambda name: "in" if name == "input" else "out",
                )

        self.Runtime = Runtime
