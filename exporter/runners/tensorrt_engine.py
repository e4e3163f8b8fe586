"""TensorRT and TensorRT-RTX engines: the plugin library is checked against engine.json and loaded, then the plan.

Device memory and streams come from torch. A test puts doubles in the place of the binding and the device, so that everything
but the GPU itself runs on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from exporter.engine import BACKENDS, SCHEMA, require_backend
from exporter.engine_worker import device_count
from exporter.runners.base import Runner
from moee.artifact import read_manifest, sha256_file
from moee.errors import MissingDependency, UserError

MANIFEST = "engine.json"


@dataclass(frozen=True)
class PluginCheck:
    """The plugin library of an engine folder against the hash that engine.json recorded when the engine was built."""

    file: str
    expected: str
    found: str

    @property
    def passed(self) -> bool:
        return self.found == self.expected

    @property
    def message(self) -> str:
        if self.passed:
            return f"{self.file} is the library that the engine was built with"
        return (
            f"{self.file} is not the library that the engine was built with (sha256 {self.found[:12]}, engine.json says "
            f"{self.expected[:12]}); run moee build again, or put the right library back"
        )


def check_plugin(folder: Path | str) -> PluginCheck:
    """Hash the plugin library of an engine folder. Raises `MissingDependency` if it is not there."""
    folder = Path(folder)
    plugin = read_manifest(folder, MANIFEST, SCHEMA, verify=False)["plugin"]
    library = folder / plugin["file"]
    if Path(plugin["file"]).name != plugin["file"]:
        raise UserError(f"{folder / MANIFEST} names the plugin {plugin['file']!r}, which leaves its folder")
    if not library.is_file():
        raise MissingDependency(f"plugin library {library} is missing; copy it there, or run moee build again")
    return PluginCheck(plugin["file"], plugin["sha256"], sha256_file(library))


class Device(Protocol):
    """Memory and order of work; `CudaDevice` is the real one."""

    def upload(self, images: np.ndarray) -> Tensor: ...
    def empty(self, shape: tuple[int, ...]) -> Tensor: ...
    def stream(self) -> int: ...
    def synchronize(self) -> None: ...
    def capture(self, work: Callable[[], None]) -> Callable[[], None]: ...


class CudaDevice:
    """The current CUDA device through torch, on a stream of its own (a CUDA graph cannot be captured on the default one)."""

    def __init__(self) -> None:
        self.own = torch.cuda.Stream()

    def upload(self, images: np.ndarray) -> Tensor:
        with torch.cuda.stream(self.own):
            return torch.from_numpy(images).cuda(non_blocking=False)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        with torch.cuda.stream(self.own):
            return torch.empty(shape, dtype=torch.float32, device="cuda")

    def stream(self) -> int:
        return self.own.cuda_stream

    def synchronize(self) -> None:
        self.own.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.own):
            work()

        def replay() -> None:
            with torch.cuda.stream(self.own):
                graph.replay()

        return replay


class EngineRunner(Runner):
    """`moee.plan` (or `dense.plan` with `model="dense"`) of a folder that `moee build` wrote.

    `cuda_graph` captures each batch size once and replays it. `binding` and `device` are for tests. Entering raises
    `MissingDependency` without the TensorRT binding, a GPU or the plugin library, `UserError` if plan or library are not
    those that engine.json names.
    """

    def __init__(
        self, folder: Path | str, model: str = "moee", *, cuda_graph: bool = False, binding: Any = None,
        device: Device | None = None,
    ):  # fmt: skip
        self.folder, self.model, self.cuda_graph = Path(folder), model, cuda_graph
        self.binding, self.device = binding, device
        self.manifest = read_manifest(self.folder, MANIFEST, SCHEMA, verify=False)
        self.backend = self.manifest["builder"].split()[0]
        self.engine: Any = None
        self.context: Any = None
        self._bound: dict[tuple[int, ...], tuple[Tensor, list[Tensor], Callable[[], None]]] = {}

    @property
    def name(self) -> str:
        version = getattr(self.binding, "__version__", "")
        return f"{self.backend} {version} GPU".replace("  ", " ")

    @property
    def outputs(self) -> list[str]:
        return [n for n in self._names() if self._mode(n) != self.binding.TensorIOMode.INPUT]

    def _names(self) -> list[str]:
        if self.engine is None:
            raise RuntimeError("EngineRunner: use the runner in a with statement")
        return [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]

    def _mode(self, name: str) -> Any:
        return self.engine.get_tensor_mode(name)

    def __enter__(self) -> Self:
        if self.model == "moee":
            plugin = check_plugin(self.folder)
            if not plugin.passed:
                raise UserError(plugin.message)
        if self.binding is None:
            require_backend(self.backend)
            self.binding = importlib.import_module(BACKENDS[self.backend][0])
        if self.device is None:
            if device_count() == 0 or not torch.cuda.is_available():
                raise MissingDependency(
                    f"running {self.folder / self.model}.plan needs an NVIDIA GPU with its driver; none was found here"
                )
            self.device = CudaDevice()
        trt = self.binding
        self.logger = trt.Logger(trt.Logger.WARNING)
        runtime = trt.Runtime(self.logger)
        if self.model == "moee":
            library = self.folder / self.manifest["plugin"]["file"]
            if runtime.get_plugin_registry().load_library(str(library.resolve())) is None:
                raise UserError(f"{self.backend} cannot load the plugin library {library}; run moee build again")
        entry = self.manifest["engines"][self.model]
        plan = self.folder / entry["file"]
        if not plan.is_file() or sha256_file(plan) != entry["sha256"]:
            raise UserError(f"{plan} is not the plan that {MANIFEST} names; run moee build again")
        self.runtime, self.engine = runtime, runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            raise UserError(f"{self.backend} cannot load {plan}: built by another version or for another GPU; build it here")
        self.context = self.engine.create_execution_context()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bound.clear()
        self.context = self.engine = self.runtime = None

    def bind(self, images: np.ndarray) -> Callable[[], None]:
        """Put `images` [B, 3, H, W] float32 on the device; returns the call that enqueues one inference without waiting."""
        shape = tuple(images.shape)
        if shape not in self._bound:
            self._bound[shape] = self._prepare(images)
        held, _, work = self._bound[shape]
        held.copy_(torch.from_numpy(images))
        return work

    def _prepare(self, images: np.ndarray) -> tuple[Tensor, list[Tensor], Callable[[], None]]:
        assert self.device is not None, "__enter__ sets the device"
        context, device = self.context, self.device
        source = next(n for n in self._names() if self._mode(n) == self.binding.TensorIOMode.INPUT)
        batch = self.manifest["batch"]
        if not context.set_input_shape(source, tuple(images.shape)):
            raise UserError(f"the engine takes batches from {batch['min']} to {batch['max']} images; came {images.shape[0]}")
        held = device.upload(images)
        results = [device.empty(tuple(context.get_tensor_shape(name))) for name in self.outputs]
        device.synchronize()

        def enqueue() -> None:
            context.set_input_shape(source, tuple(images.shape))
            context.set_tensor_address(source, held.data_ptr())
            for name, tensor in zip(self.outputs, results, strict=True):
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(device.stream()):
                raise RuntimeError(f"{self.backend} failed to run {self.model}.plan; its log says why")

        if not self.cuda_graph:
            return held, results, enqueue
        enqueue()  # loads kernels and times tactics, which a capture forbids
        device.synchronize()
        return held, results, device.capture(enqueue)

    def wait(self) -> None:
        """Block until everything that was enqueued is done."""
        assert self.device is not None, "__enter__ sets the device"
        self.device.synchronize()

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        work = self.bind(images)
        self.wait()  # the upload is on torch's stream
        work()
        self.wait()
        return [tensor.cpu().numpy().copy() for tensor in self._bound[tuple(images.shape)][1]]
