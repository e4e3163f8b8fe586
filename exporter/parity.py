"""Parity: the torch MoEE model against `portable.onnx` in ONNX Runtime, with the experts that each token took."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporter.onnx_export import MOEE_DATA, PORTABLE
from exporter.runners import OnnxRunner
from moee.checkpoint import MoeeModel
from moee.data import ImageSet, batches
from moee.errors import UserError
from moee.layer import routed_layers
from moee.progress import Reporter, silent

BATCHES = (1, 2, 8)
MAX_RELATIVE_ERROR = 1e-4  # of the output's root mean square, float32
MIN_ROUTE_AGREEMENT = 0.9999
AGREEMENT_IMAGES = 64


@dataclass(frozen=True)
class BatchError:
    """Absolute errors of one batch size, and the root mean square of the reference output."""

    batch: int
    max_abs_error: float
    mean_abs_error: float
    output_rms: float

    @property
    def relative(self) -> float:
        return self.max_abs_error / max(self.output_rms, 1e-30)


@dataclass(frozen=True)
class ParityResult:
    """Errors by batch size, share of equal routes by layer, share of equal top-1 classes (None without a head)."""

    runtime: str
    batches: list[BatchError]
    route_agreement: dict[str, float]
    top1_agreement: float | None
    images: int

    @property
    def max_abs_error(self) -> float:
        return max(b.max_abs_error for b in self.batches)

    @property
    def mean_route_agreement(self) -> float:
        return sum(self.route_agreement.values()) / len(self.route_agreement)

    @property
    def passed(self) -> bool:
        close = all(b.relative <= MAX_RELATIVE_ERROR for b in self.batches)
        return close and min(self.route_agreement.values()) >= MIN_ROUTE_AGREEMENT

    def __bool__(self) -> bool:
        return self.passed

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "moee.parity/1",
            **asdict(self),
            "max_abs_error": self.max_abs_error,
            "tolerance": {"max_relative_error": MAX_RELATIVE_ERROR, "min_route_agreement": MIN_ROUTE_AGREEMENT},
            "passed": self.passed,
        }


@contextmanager
def with_routes(graph: Path, layers: list[str]) -> Iterator[Path]:
    """A temporary copy of a portable graph that also outputs `<layer>/route` of every layer, in that order."""
    model = ir.load(graph)
    values = {v.name: v for node in model.graph for v in node.outputs}
    for layer in layers:
        value = values.get(f"{layer}/route")
        if value is None:
            raise UserError(f"{graph} has no value {layer}/route; it was not made from this model, export it again")
        model.graph.outputs.append(value)
    with tempfile.TemporaryDirectory(prefix="moee-") as folder:
        data = graph.parent / MOEE_DATA
        if data.is_file():
            try:
                os.link(data, Path(folder) / MOEE_DATA)
            except OSError:
                shutil.copyfile(data, Path(folder) / MOEE_DATA)
        ir.save(model, Path(folder) / PORTABLE)
        yield Path(folder) / PORTABLE


class _RouteRecorder:
    """Keeps the routes that every routed layer takes during a torch forward pass."""

    def __init__(self, model: torch.nn.Module):
        self.routes: dict[str, Tensor] = {}
        for name, layer in routed_layers(model).items():
            layer.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str):
        def hook(module, args):
            self.routes[name] = module.routes(args[0]).flatten()

        return hook


@torch.inference_mode()
def check_parity(
    export_dir: Path | str, moee: MoeeModel, data: ImageSet, threads: int | None = None, report: Reporter = silent
) -> ParityResult:
    """Compare torch and ONNX Runtime on images of `data`: batch sizes `BATCHES`, then up to 64 images for agreement.

    Raises `UserError` for a graph that does not belong to the model.
    """
    names = list(routed_layers(moee.model))
    recorder = _RouteRecorder(moee.model)
    equal, seen = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    same_class, images, errors = 0, 0, []
    order = torch.arange(min(len(data), AGREEMENT_IMAGES))
    pool = torch.cat([b.images for b in batches(data, 8, order=order)])
    plan = [(b, True) for b in BATCHES if b <= len(pool)] + [(8, False)] * (len(pool) // 8)
    start = 0
    with with_routes(Path(export_dir) / PORTABLE, names) as path, OnnxRunner(path, threads) as runner:
        for step, (size, is_error) in enumerate(plan):
            start = 0 if is_error else start
            x = pool[start : start + size]
            start += 0 if is_error else size
            expected = moee.model(x).double().numpy()
            got, *routes = runner.run(x.numpy())
            if got.shape != expected.shape:
                raise UserError(f"{path.name} gives {got.shape}, the model {expected.shape}; export it again")
            difference = np.abs(got - expected)
            rms = float(np.sqrt(np.mean(expected**2)))
            if is_error:
                errors.append(BatchError(size, float(difference.max()), float(difference.mean()), rms))
            for name, theirs in zip(names, routes, strict=True):
                ours = recorder.routes[name].numpy()
                equal[name] += int((ours == theirs.reshape(-1)).sum())
                seen[name] += ours.size
            if not is_error:
                images += size
                same_class += int((_classes(moee, expected) == _classes(moee, got)).sum())
            report("parity", step + 1, len(plan))
    has_classes = moee.probe is not None or bool(getattr(moee.model, "num_classes", 0))
    agreement = same_class / images if has_classes and images else None
    return ParityResult(runner.name, errors, {n: equal[n] / seen[n] for n in names}, agreement, images)


def _classes(moee: MoeeModel, outputs: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(np.asarray(outputs, np.float32))
    return (moee.probe.logits(tensor) if moee.probe is not None else tensor).argmax(1).numpy()
