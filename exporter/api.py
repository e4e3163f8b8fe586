"""The Python interface: from a routed model to graphs, their verification, engines and a bundle, with timings.

    import exporter
    exporter.compress(model, train_loader, val_loader, out="runs/mine", max_drop=1)   # everything below in one call
    exporter.export(result, "runs/export", precision="fp16")
    assert exporter.verify("runs/export", result, val_loader, max_drop=0.5)
    print(exporter.bench("runs/export", val_loader, model=result).speedup)

The functions that the command line calls, with images as Python has them (`moee.api`).
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from exporter.compression.clock import LEAST_S, MOST_S
from exporter.compression.job import Compressed, Job
from exporter.compression.request import TIME_S, Request, target_sm
from exporter.engines.build import EngineReport, build_engines, needs_plugin, require_backend
from exporter.engines.plugin_cache import ensure_kernels, ensure_plugin
from exporter.graph import export as onnx_export
from exporter.manifests import image_record, read_export, refuse_lost_dense
from exporter.precision import dtype_of, refuse_calibration
from exporter.quantization import CALIBRATION_IMAGES
from exporter.ship.cpu_bundle import CPU, write_cpu_bundle
from exporter.ship.deployment import write_deployment
from exporter.targets.registry import target_of
from exporter.timing.latency import LatencyResult
from exporter.timing.latency import bench as time_export
from exporter.verification import VerifyResult
from exporter.verification import verify as verify_export
from exporter.verification.quick import QuickCheck
from exporter.verification.quick import quick_check as check_quickly
from moee.api import INPUT_SIZE, OF_INPUT, SCRATCH, held_out_images
from moee.artifacts.model import MoeeModel
from moee.bounds import AGREEMENT, BATCH, CALIBRATION, DROP, IMAGES, JOBS, RUNS, SECONDS, Bounds, real, several, whole
from moee.config import validated
from moee.data.image_set import batches
from moee.data.sources import located
from moee.errors import UserError
from moee.interface.spec import InputConfig
from moee.keywords import in_python
from moee.places.inputs import source_paths
from moee.places.staged_folder import StagedFolder
from moee.planning.budget import Budget
from moee.progress import Reporter, to_stderr
from moee.stages.opened import Images, session_of
from plugins.devices import known_sms

log = logging.getLogger("moee")
BATCHES = (1, 8, 32)  # smallest, optimal and largest of a profile


@in_python(renamed={"data": "calibration"})
def export(
    model: MoeeModel, out: str | Path, *, precision: str = "fp32", calibration: Images = None,
    calibration_images: int | None = None, source: str | Path | None = None, force: bool = False, runtime_ops: bool = False,
    report: Reporter | None = None,
) -> Path:  # fmt: skip
    """Write `dense.onnx`, `portable.onnx`, `tensorrt.onnx` and `export.json` into the folder `out`, which is returned.

    `precision`: fp32, fp16, bf16, int8 or int8-fp32; for the last two `calibration` gives images (default: those that the model
    was made on). `runtime_ops`: also `runtime.onnx`, for ONNX Runtime on a CPU with the operator's library. `source`: the
    artifact that the model was saved in, by which the command line verifies the export. Raises `UserError` for a place that must
    not be replaced, an unknown precision or images that cannot be read.
    """
    report = report or to_stderr()
    dtype_of(precision)
    refuse_calibration(precision, calibration is not None or calibration_images is not None)
    count = whole("calibration_images", CALIBRATION_IMAGES if calibration_images is None else calibration_images, CALIBRATION)
    images = held_out_images(model, calibration, report) if calibration is not None else None
    onnx_export.export(
        model, out, force=force, report=report, source=source, precision=precision, calibration=images, calibration_images=count,
        runtime_ops=runtime_ops,
    )  # fmt: skip
    return Path(out)


@in_python()
def verify(
    export_dir: str | Path, model: MoeeModel, data: Images = None, *, max_drop: float | None = None,
    sizes: Sequence[int] = BATCHES, min_route_agreement: float | None = None, images: int | None = 1000, provider: str = "cpu",
    engine: str | Path | None = None, report: Reporter | None = None,
) -> VerifyResult:  # fmt: skip
    """Compare an export with the `model` that it was made from, output by output and layer by layer, and both models' accuracy
    on the held-out images `data` (default: those that the model was made on). The result is true if every gate passed.

    `max_drop`: percentage points of accuracy that may be lost. `sizes`: batches. `images`: how many labelled images (None:
    all, 0: none, and no accuracy). Raises `UserError` for a gate that has nothing to check or could not fail.
    """
    report = report or to_stderr()
    sizes = several("sizes", sizes, BATCH)
    max_drop = None if max_drop is None else real("max_drop", max_drop, DROP)
    least = None if min_route_agreement is None else real("min_route_agreement", min_route_agreement, AGREEMENT)
    images = None if images is None else whole("images", images, IMAGES)
    refuse_lost_dense(read_export(export_dir), export_dir)
    held_out = held_out_images(model, data, report)
    return verify_export(
        export_dir, model, held_out, sizes=sizes, provider=provider, max_drop_pp=max_drop,
        min_route_agreement=least, images=images, engine=engine, report=report,
    )  # fmt: skip


@in_python()
def quick_check(path: str | Path, model: MoeeModel | None = None) -> QuickCheck:
    """What `moee verify --quick` checks of a model, an export, engines or a bundle, in seconds: manifest, hashes, graphs, the
    operator's contract, parity on random images. The result is true if all of it passed; `not_done` says what it leaves out.

    `model`: what an export was made from, where its artifact is not at hand. Raises `UserError` for a damaged folder.
    """
    return check_quickly(path, model)


@in_python([*inspect.signature(time_export).parameters], {"duration": "duration_s", "throughput": "throughput_s"})
def bench(
    export_dir: str | Path, data: Images = None, *, model: MoeeModel | None = None, batch: int = 8, runs: int = 40,
    duration_s: float = 3.0, threads: int | None = None, provider: str = "cpu", engine: str | Path | None = None,
    report: Reporter | None = None, **options: Any,
) -> LatencyResult:  # fmt: skip
    """Time the dense and the routed graph of an export, interleaved in this process, on the held-out images `data` (default:
    those that the model was made on; routing depends on them). Images given in Python need the `model`, which says how they
    look.

    Latencies are in milliseconds, with the median ratio and its verdict. `options` are those of `exporter.timing.latency.bench`.
    Raises `UserError` for images in Python without the model, and as that function does.
    """
    report = report or to_stderr()
    batch, runs = whole("batch", batch, BATCH), whole("runs", runs, RUNS)
    duration_s = real("duration_s", duration_s, SECONDS)
    threads = None if threads is None else whole("threads", threads, JOBS)
    if "streams" in options:
        whole("streams", options["streams"], JOBS)
    if "throughput_s" in options:
        real("throughput_s", options["throughput_s"], SECONDS)
    manifest = read_export(export_dir)
    refuse_lost_dense(manifest, export_dir)
    if model is not None:
        held_out = held_out_images(model, data, report)
    elif data is None or isinstance(data, (str, Path)):
        held_out = image_record(manifest, export_dir).images("val", None if data is None else str(data), report)
    else:
        raise UserError("images given in Python need the model that the export was made from: bench(..., model=MODEL)")
    images = next(batches(held_out, batch)).images.numpy()
    return time_export(
        export_dir, batch, runs=runs, threads=threads, images=images, report=report, duration_s=duration_s, provider=provider,
        engine=engine,
        named=located(held_out.name), **options,
    )  # fmt: skip


@in_python()
def build(
    export_dir: str | Path, out: str | Path, *, backend: str = "tensorrt-rtx", batch: tuple[int, int, int] = BATCHES,
    sms: Sequence[int | str] | str | None = None, plugin: str | Path | None = None, force: bool = False,
    report: Reporter | None = None,
) -> EngineReport:  # fmt: skip
    """Build the dense and the routed engine of an export into the folder `out`.

    `batch`: smallest, optimal and largest of the profile. `sms`: devices that the plugin's kernels are compiled for, each by its
    name or its SM: "orin", 87, "sm_87" or "8.7" (default: all); `plugin`: a library that was built before. Raises `BuildFailed`
    with the builder's words.
    """
    report = report or to_stderr()
    wanted = None if sms is None else known_sms(sms.split(",") if isinstance(sms, str) else sms)
    require_backend(backend)
    batch = _profile(batch)
    library = Path(plugin) if plugin is not None else None
    if library is None and needs_plugin(export_dir):
        library = ensure_plugin(wanted, report)
    return build_engines(Path(export_dir), Path(out), plugin=library, backend=backend, batch=batch, force=force)


@in_python()
def bundle(
    export_dir: str | Path, out: str | Path, *, sm: int | str, batch: tuple[int, int, int] = BATCHES,
    model: MoeeModel | nn.Module | str | None = None, force: bool = False, report: Reporter | None = None,
) -> Path:  # fmt: skip
    """Write everything that a device needs into the folder `out`: graphs, plugin, runner, build.sh.

    `sm`: the device by its name or its SM: "orin", 87, "sm_87" or "8.7"; "cpu" for a folder that ONNX Runtime runs. `model`: a
    dense model of your own, as the `MoeeModel` that was exported, the module, or the name `package.module:function`.
    """
    report, probe = report or to_stderr(), None
    if isinstance(model, MoeeModel):
        probe = model.probe
        model = model.spec.module or (model.spec.name if model.spec.library == "python" else None)
    if sm == CPU:
        return write_cpu_bundle(export_dir, out, force=force, word=model, probe=probe)
    sms, batch = known_sms([sm]), _profile(batch)
    return write_deployment(
        export_dir, out, sms[0], partial(ensure_kernels, sms, report), batch, force=force, word=model, probe=probe
    )


@in_python(renamed={"time": "time_s", "img_size": INPUT_SIZE, **OF_INPUT, **SCRATCH})
def compress(
    model: nn.Module | str, data: Images, val: Images = None, *, out: str | Path, max_drop: float | None = None,
    min_cosine: float | None = None, target_latency_ms: float | None = None, device: str = CPU, sm: str | int | None = None,
    batch: int = 8, time_s: float | None = TIME_S, classes: Sequence[str] = (), num_classes: int | None = None,
    input: InputConfig | Mapping[str, Any] | None = None, torch_device: str = "auto", force: bool = False,
    confirm: str | Path | None = None, memory: int | str | None = None, report: Reporter | None = None,
) -> Compressed:  # fmt: skip
    """The fastest model within a budget, by measurement: plan, extract, tune, export, verify, bench, bundle and report, each
    stage's artifact in the folder `out`. An interrupted call goes on where it was.

    `model`, `data`, `val`, `classes`, `num_classes`, `input` and `memory` as for `moee.extract`. `max_drop`: percentage points of
    accuracy; without any budget 1 point, or a cosine of 0.98 where accuracy cannot be compared. `device`: where candidates are
    timed, "cpu" or a board's name (modelled); `sm`: the GPU that the bundle is for (default: that of `device`). `time_s`: seconds
    that it may take, None for no limit. `confirm`: further images by the name of a source, on which the result is measured once
    it is chosen.
    What it does is said on stderr, or logged where a `report` is given. Raises `BudgetUnmet` where
    nothing meets the budget, `StepFailed` if the result does not verify.
    """
    limits = {"max_drop": max_drop, "min_cosine": min_cosine, "target_latency_ms": target_latency_ms}
    given = {name: value for name, value in limits.items() if value is not None}
    budget = validated(Budget, given) if given else None
    if time_s is not None:
        real("time_s", time_s, Bounds(LEAST_S, MOST_S))
    bundled = target_sm(device, None if sm is None else str(sm))
    told = None if confirm is None else str(confirm)
    request = Request(budget, device, bundled, whole("batch", batch, BATCH), time_s, confirm=told)
    target_of(device, batch=batch, sm=bundled).check()
    place = StagedFolder(out, force=force, inputs=source_paths(data if isinstance(data, (str, Path)) else None, told))
    place.check()
    say = log.info if report is not None else partial(print, file=sys.stderr)
    report = report or to_stderr()
    session = session_of(
        model, data, val, classes=classes, num_classes=num_classes, input=input, device=torch_device, report=report,
        memory=memory,
    )  # fmt: skip
    word = model if session.spec.library in ("python", "module") else None
    return Job(session, place, request, report, say, word).run()


def _profile(batch: Sequence[int]) -> tuple[int, int, int]:
    """Smallest, optimal and largest batch; their order is the builder's to check."""
    match several("batch", batch, BATCH):
        case (low, optimal, high):
            return low, optimal, high
    raise UserError(f"batch: expected the smallest, the optimal and the largest of the profile, came {batch}")
