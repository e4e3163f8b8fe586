"""TensorRT and TensorRT-RTX engines: the plugin library is checked against engine.json and loaded, then the plan.

Device memory and streams come from torch. A test puts doubles in the place of the binding and the device, so that everything
but the GPU itself runs on the CPU.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from exporter.engines.build import BACKENDS, require_backend
from exporter.engines.worker import device_count
from exporter.manifests import ENGINE, code_file, read_engine
from exporter.runners.base import Runner
from moee.errors import MissingDependency, UserError
from moee.store.artifact import sha256_file

log = logging.getLogger("moee")


@dataclass(frozen=True)
class PluginCheck:
    """The plugin library of an engine folder against the hash that engine.json recorded when the engine was built. `file` is
    empty for an engine of standard operators alone."""

    file: str
    expected: str
    found: str
    trusted: bool = False

    @property
    def passed(self) -> bool:
        return self.found == self.expected or self.trusted

    @property
    def message(self) -> str:
        if not self.file:
            return "the engine needs no plugin"
        if self.found == self.expected:
            return f"{self.file} is the library that the engine was built with"
        if self.trusted:
            return f"{self.file} is not the library that the engine was built with, and is loaded because of --trust-engine"
        return (
            f"{self.file} is not the library that the engine was built with (sha256 {self.found[:12]}, engine.json says "
            f"{self.expected[:12]}); run moee build again, or put the right library back"
        )


def check_plugin(folder: Path | str, trust: bool = False) -> PluginCheck:
    """Hash the plugin library of an engine folder; with `trust`, any will do. Raises `MissingDependency` if it is not there."""
    folder = Path(folder)
    manifest = read_engine(folder, trust)
    plugin, layers = manifest["plugin"], manifest["plugin_layers"]
    if not plugin["file"]:
        if layers:
            raise UserError(f"{folder / ENGINE} names no plugin library for its {layers} plugin layers; run moee build again")
        return PluginCheck("", "", "")
    library = code_file(folder, plugin["file"])
    if not library.is_file():
        raise MissingDependency(f"plugin library {library} is missing; copy it there, or run moee build again")
    return PluginCheck(plugin["file"], plugin["sha256"], sha256_file(library), trust)


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
    those that engine.json names: both are code, and neither is opened before. `trust` loads them all the same.
    """

    def __init__(
        self, folder: Path | str, model: str = "moee", *, cuda_graph: bool = False, binding: Any = None,
        device: Device | None = None, trust: bool = False,
    ):  # fmt: skip
        self.folder, self.model, self.cuda_graph, self.trust = Path(folder), model, cuda_graph, trust
        self.binding, self.device = binding, device
        self.manifest = read_engine(self.folder, trust)
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
            plugin = check_plugin(self.folder, self.trust)
            if not plugin.passed:
                raise UserError(plugin.message)
        plan = self._plan()
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
        if self.model == "moee" and self.manifest["plugin"]["file"]:
            library = self.folder / self.manifest["plugin"]["file"]
            if runtime.get_plugin_registry().load_library(str(library.resolve())) is None:
                raise UserError(f"{self.backend} cannot load the plugin library {library}; run moee build again")
        self.runtime, self.engine = runtime, runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            plan_file = f"{self.folder / self.model}.plan"
            raise UserError(f"{self.backend} cannot load {plan_file}: built by another version or for another GPU; build it here")
        self.context = self.engine.create_execution_context()
        return self

    def _plan(self) -> bytes:
        """The plan's bytes, hashed as they will be used."""
        entry = self.manifest["engines"][self.model]
        path = code_file(self.folder, entry["file"])
        if not path.is_file():
            raise UserError(f"{path} is missing; run moee build again")
        plan = path.read_bytes()
        if hashlib.sha256(plan).hexdigest() != entry["sha256"]:
            if not self.trust:
                raise UserError(
                    f"{path} is not the plan that {ENGINE} names; run moee build again (an engine is code; --trust-engine loads "
                    "it all the same)"
                )
            log.warning("--trust-engine: %s is not the plan that %s names", path, ENGINE)
        return plan

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

    def bound(self, images: np.ndarray) -> Callable[[], None]:
        """The images stay on the device: their copy is not what is timed."""
        work = self.bind(images)
        self.wait()

        def once() -> None:
            work()
            self.wait()

        return once

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
