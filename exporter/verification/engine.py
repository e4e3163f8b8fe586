"""A built engine on this machine's GPU against the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.belonging import built_from
from exporter.graph.export import TENSORRT, read_quantization
from exporter.manifests import read_engine, read_export
from exporter.parity import BatchError
from exporter.parity.check import image_pool, output_errors
from exporter.parity.yardsticks import yardsticks
from exporter.precision import Quantization
from exporter.runners import EngineRunner, PluginCheck, Runner
from exporter.verification.result import EngineParity
from moee.artifacts.model import MoeeModel
from moee.data.image_set import ImageSet
from moee.progress import Reporter, silent


def check_engine(
    export_dir: Path, folder: Path, plugin: PluginCheck, moee: MoeeModel, data: ImageSet, *, precision: str, rtol: float | None,
    atol: float | None, report: Reporter, trust: bool = False,
) -> EngineParity:  # fmt: skip
    """Run the MoEE engine at its own profile's batch sizes."""
    manifest = read_engine(folder, trust)
    export = read_export(export_dir, verify=False)
    same = built_from(manifest, export, export_dir / export.get("graphs", {}).get("tensorrt", TENSORRT))
    if not plugin.passed:
        return EngineParity(manifest["builder"], plugin, same)
    sizes = sorted({manifest["batch"][k] for k in ("min", "opt", "max")})
    with EngineRunner(folder, trust=trust) as runner:
        errors = run_engine(
            runner, moee, data, precision, sizes, rtol=rtol, atol=atol, report=report,
            quantization=read_quantization(export, "moee"),
        )  # fmt: skip
        return EngineParity(runner.name, plugin, same, errors)


def run_engine(
    runner: Runner, moee: MoeeModel, data: ImageSet, precision: str, sizes: Sequence[int], *, rtol: float | None = None,
    atol: float | None = None, report: Reporter = silent, quantization: Quantization | None = None,
) -> list[BatchError]:  # fmt: skip
    """Output errors of an engine that is open already; `quantization` of an int8 one."""
    yard = yardsticks(moee.model, precision, quantization=quantization)
    return output_errors(runner, yard, image_pool(data, sizes[-1])[0], sizes, rtol, atol=atol, report=report, message="engine")
