"""Runners: one interface over the runtimes that execute an exported graph. Context managers, NumPy in and out."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np
import onnxruntime as ort

from moee.errors import UserError


class OnnxRunner:
    """ONNX Runtime on the CPU. `outputs` of `run` follow the graph's outputs."""

    def __init__(self, path: Path | str, threads: int | None = None):
        self.path, self.threads = Path(path), threads or os.cpu_count() or 1
        self.session: ort.InferenceSession | None = None

    @property
    def name(self) -> str:
        return f"onnxruntime {ort.__version__} CPU"

    def __enter__(self) -> OnnxRunner:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # a session's worker threads spin after a run; that would slow another session timed right after it
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            reason = str(error).splitlines()[0]
            raise UserError(f"ONNX Runtime cannot load {self.path}: {reason}; export it again") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.session = None

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """images [B, 3, H, W] float32 to the list of the graph's outputs."""
        assert self.session is not None, "use the runner in a with statement"
        return list(self.session.run(None, {self.session.get_inputs()[0].name: images}))
