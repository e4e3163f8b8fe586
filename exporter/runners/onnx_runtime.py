"""ONNX Runtime, with the provider that was asked for and no other in its place."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx
import onnxruntime as ort

from exporter.onnx_safety import check_onnx
from exporter.runners.base import GraphRunner
from exporter.runners.operator_cache import ensure_operator
from moee.errors import MissingDependency, UserError
from moee.parallel.machine import usable_cpus
from moee.schema import shown
from moee.store.scratch import temporary_folder
from plugins.contract import DOMAIN

# name on the command line: ONNX Runtime's name, label in results, what it needs
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "CPU", "pip install onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "CUDA", "onnxruntime-gpu, an NVIDIA driver, CUDA and cuDNN"),
    "tensorrt": ("TensorrtExecutionProvider", "TensorRT", "onnxruntime-gpu, an NVIDIA driver, CUDA and TensorRT"),
}
FATAL = 4


class OnnxRunner(GraphRunner):
    """ONNX Runtime on `provider` (cpu, cuda, tensorrt). A graph with `MoeeFfn` nodes needs the CPU and the operator's library,
    which is compiled if the cache lacks it. `profile` is a path prefix for a trace of every node's time.

    Entering raises `UserError` for a file that `check_onnx` or ONNX Runtime refuses.
    """

    def __init__(self, path: Path | str, threads: int | None = None, provider: str = "cpu", profile: Path | None = None):
        if provider not in PROVIDERS:
            raise UserError(f"unknown ONNX Runtime provider {provider!r}; expected one of {', '.join(PROVIDERS)}")
        self.path, self.threads, self.provider = Path(path), threads or usable_cpus(), provider
        self.profile = profile
        self.session: ort.InferenceSession | None = None
        self.operator = False

    @property
    def name(self) -> str:
        return f"onnxruntime {ort.__version__} {PROVIDERS[self.provider][1]}{' with MoeeFfn' if self.operator else ''}"

    @property
    def outputs(self) -> list[str]:
        return [o.name for o in self._open().get_outputs()]

    def __enter__(self) -> Self:
        wanted, label, fix = PROVIDERS[self.provider]
        missing = f"ONNX Runtime's {label} provider does not work here; it needs: {fix}"
        if wanted not in ort.get_available_providers():
            raise MissingDependency(missing)
        self.operator = any(node.domain == DOMAIN for node in check_onnx(self.path).graph.node)
        if self.operator and self.provider != "cpu":
            raise UserError(f"{self.path} has MoeeFfn nodes, which ONNX Runtime knows on the CPU alone; use portable.onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = FATAL  # errors are raised, and the exception says the same
        ort.set_default_logger_severity(FATAL)  # of a provider that lacks its libraries too
        # a session's worker threads spin after a run; that would slow another session timed right after it
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.operator:
            options.register_custom_ops_library(str(ensure_operator()))
        if self.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile)
        try:
            session = ort.InferenceSession(str(self.path), options, providers=[wanted], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            reason = _reason(error)
            if self.provider != "cpu":
                raise MissingDependency(f"{missing} ({reason})") from error
            raise UserError(f"ONNX Runtime cannot load {self.path}: {reason}; export it again") from error
        if session.get_providers()[0] != wanted:  # ONNX Runtime goes on with the CPU and only logs it
            raise MissingDependency(missing)
        self.session = session
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.session = None

    def _open(self) -> ort.InferenceSession:
        if self.session is None:
            raise RuntimeError(f"{type(self).__name__}: use the runner in a with statement")
        return self.session

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        inputs = self._open().get_inputs()
        if len(inputs) != 1:
            raise UserError(f"{self.path} has {len(inputs)} inputs, expected the images alone; export it again")
        return self.run_feeds({inputs[0].name: images})

    def run_feeds(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        session = self._open()
        try:
            return list(session.run(None, feeds))
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise UserError(f"ONNX Runtime fails at running {self.path}: {_reason(error)}; export it again") from error

    def end_profile(self) -> Path:
        """Stop profiling and return the trace, a JSON file in Chrome's format."""
        return Path(self._open().end_profiling())


def _reason(error: Exception) -> str:
    return shown(next(iter(str(error).splitlines()), type(error).__name__), quoted=False)


def provider_works(provider: str) -> bool:
    """Whether a one-node graph runs on `provider`."""
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy")
    graph = onnx.helper.make_graph([node], "probe", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    with temporary_folder() as folder:
        onnx.save(model, folder / "probe.onnx")
        try:
            with OnnxRunner(folder / "probe.onnx", 1, provider) as runner:
                return bool(runner.run(np.ones(1, np.float32))[0][0] == 1)
        except MissingDependency:
            return False
