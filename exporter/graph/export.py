"""ONNX export: one traced graph with `MoeeFfn` nodes, and the portable form that a pass makes of it. A layer of one expert is a
plain MLP in both, gated or not.

`dense.onnx` has a weight file of its own; `tensorrt.onnx`, `portable.onnx` and `runtime.onnx` (if asked for) share `moee.data`.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
from pydantic import ValidationError

from exporter.belonging import BELONGS_TO, dense_ids, source_ids
from exporter.forms.registry import form_of
from exporter.graph.runtime_graph import KEY, PORTABLE, RUNTIME, refuse_runtime, write_runtime
from exporter.graph.trace import INPUT, OPSET, OPSETS, OUTPUT, explained, to_onnx
from exporter.manifests import input_body
from exporter.passes.clear import Form, lower_clear_ffn
from exporter.passes.gated import lower_gated
from exporter.passes.low_rank import lower_low_rank
from exporter.passes.name_merges import name_merges
from exporter.passes.name_routes import name_routed_nodes
from exporter.passes.plain import lower_single_experts
from exporter.passes.portable import lower_routed_ffn
from exporter.precision import INT8, Quantization, dtype_of, refuse_overflow, typed
from exporter.quantization import CALIBRATION_IMAGES, calibrate, quantized
from exporter.runners import OnnxRunner
from exporter.runners.operator_cache import operator_or_reason
from moee.artifacts.card import model_card, write_card
from moee.artifacts.checkpoint import manifest_body
from moee.artifacts.model import MoeeModel
from moee.artifacts.stages import latest
from moee.data.image_set import ImageSet, say_read
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.measure.metrics import tokens_per_image
from moee.models.model import Shape
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.progress import Reporter, silent
from moee.schema import reason_of
from moee.space import estimate
from moee.space.refusal import refuse_without_space
from moee.store.artifact import write_manifest
from moee.store.result_kinds import EXPORT
from moee.tokens.block import merging_like, token_merges
from plugins.contract import DOMAIN

log = logging.getLogger("moee")
SCHEMA = "moee.export/1"
MANIFEST = "export.json"
DENSE, TENSORRT = "dense.onnx", "tensorrt.onnx"
MOEE_DATA, DENSE_DATA = "moee.data", "dense.data"
REFERENCE, REFERENCE_DATA = "reference.onnx", "reference.data"  # of int8: the dense model as it was, for accuracy
TRACED = "traced.onnx"  # what both graphs are lowered from; removed before the export is done
CLEAR_TENSORRT: Form = "masked"  # no plugin: plain products with a mask (docs/method.md)


def export(
    moee: MoeeModel, path: Path | str, *, force: bool = False, report: Reporter = silent, source: Path | str | None = None,
    precision: str = "fp32", calibration: ImageSet | None = None, calibration_images: int = CALIBRATION_IMAGES,
    dense: bool = False, dense_from: Path | None = None, runtime_ops: bool = False,
) -> None:  # fmt: skip
    """Write `dense.onnx`, `tensorrt.onnx`, `portable.onnx`, their weights and `export.json` into folder `path`.

    `source`, the artifact that `moee` was loaded from, is recorded so that `verify` finds it again. `precision` is fp32, fp16
    or bf16, the type of all three graphs (see `exporter.precision`), or int8 or int8-fp32: then both models are
    calibrated on `calibration_images` images of `calibration` (default: training images of the data that the model was last
    made on), and `reference.onnx`, the dense model in float32, is written too. `dense`: the model is the dense one itself, and
    all three graphs are of it. `dense_from`: an export of the same model in the same precision, whose dense graph is taken:
    tracing it again takes as long as the other. `runtime_ops`: `runtime.onnx` too, for ONNX Runtime with the operator's library
    (`exporter.graph.runtime_graph`). Raises `UserError` if `path` exists and `force` is off, if another model has no
    routed layer, for an unknown precision or data that cannot be read.
    """
    dtype = dtype_of(precision)
    weights = weights_of(moee)
    layers = routed_layers(moee.model)
    merges = token_merges(moee.model)
    if not layers and not merges and not dense:
        raise UserError("the model has no routed layer and merges no tokens; run moee extract first")
    if runtime_ops:
        refuse_runtime(layers, precision)
    transform = model_transform(moee.model)
    output = OutputFolder(path, EXPORT, force, source_paths(source))
    output.check()
    refuse_without_space([space_of(moee, precision)], weights, folder=output.place.parent)
    made_from = dense_ids(moee.spec.model_dump(mode="json")) if dense else source_ids(source)
    graphs = {"dense": DENSE, "portable": PORTABLE, "tensorrt": TENSORRT}
    original, model, quantization = moee.dense().eval(), moee.model.eval(), {}
    reference = None
    if precision in INT8:
        given = calibration or _calibration_data(moee, report)
        both = {"dense": original, "moee": model}
        quantization = {n: calibrate(m, given, dtype, calibration_images, report) for n, m in both.items()}
        reference, graphs["reference"] = original, REFERENCE
        original, model = (quantized(m, quantization[n].input_scales, dtype) for n, m in both.items())
    for whose, candidate in (("the dense model", original), ("the model with experts", model)):
        refuse_overflow(candidate, dtype, precision, whose)
    report("export", 0, 3)
    with output.write() as folder, explained():
        if reference is not None:
            ir.save(to_onnx(reference, transform.shape), folder / REFERENCE, external_data=REFERENCE_DATA)
        if dense_from is None:
            ir.save(to_onnx(typed(original, dtype), transform.shape), folder / DENSE, external_data=DENSE_DATA)
        else:
            for name in (DENSE, DENSE_DATA):
                shutil.copy2(dense_from / name, folder / name)
        report("export", 1, 3)
        graph = to_onnx(typed(model, dtype), transform.shape)
        forms = portable_forms(moee, transform.shape)
        name_routed_nodes(graph, list(layers))
        name_merges(graph, list(merges))
        plain = lower_single_experts(graph) + lower_gated(graph) + lower_low_rank(graph)
        traced = folder / TRACED
        ir.save(graph, traced, external_data=MOEE_DATA)
        tensorrt = ir.load(traced)
        lower_clear_ffn(tensorrt, CLEAR_TENSORRT)
        plugin_nodes = sum(node.domain == DOMAIN for node in tensorrt.graph)
        if not plugin_nodes:
            tensorrt.opset_imports.pop(DOMAIN, None)
        ir.save(tensorrt, folder / TENSORRT)
        report("export", 2, 3)
        portable = ir.load(traced)
        lowered = len(plain) + lower_clear_ffn(portable, forms) + lower_routed_ffn(portable)
        if lowered != len(layers):
            raise RuntimeError(f"{lowered} routed nodes exported for {len(layers)} routed layers; please report this")
        portable.opset_imports.pop(DOMAIN, None)
        ir.save(portable, folder / PORTABLE)
        if runtime_ops:
            write_runtime(traced, folder / RUNTIME, forms)
            graphs[KEY] = RUNTIME
        traced.unlink()
        _refuse_unloadable(folder, precision)
        body = {
            "input": input_body(INPUT, transform),
            "output": {"name": OUTPUT},
            "opset": OPSETS.get(dtype, OPSET),
            "precision": precision,
            "model": moee.spec.model_dump(),
            "data": moee.data,
            "seed": moee.record.seed,
            "classes": list(moee.classes),
            "cost": _latest_cost(moee),
            "source": os.path.relpath(Path(source).resolve(), Path(path).resolve()) if source is not None else None,
            BELONGS_TO: made_from,
            "routed_layers": list(layers),
            "experts": {name: layer.num_experts for name, layer in layers.items()},
            "merged_tokens": {name: merge.merged for name, merge in merges.items()},
            "clear_forms": forms,
            "plugin_nodes": plugin_nodes,
            "graphs": graphs,
            "quantization": {name: q.model_dump() for name, q in quantization.items()} or None,
        }
        write_card(folder, model_card(manifest_body(moee), body))
        write_manifest(folder, MANIFEST, SCHEMA, body)
    report("export", 3, 3)


def weights_of(moee: MoeeModel) -> int:
    """Numbers that the model holds."""
    return sum(parameter.numel() for parameter in moee.model.parameters())


def space_of(moee: MoeeModel, precision: str) -> estimate.Need:
    """What its export takes."""
    return estimate.export(weights_of(moee), precision in INT8)


def _refuse_unloadable(folder: Path, precision: str) -> None:
    """Raise `UserError` for graphs that ONNX Runtime cannot load, before they take the place of others. On the CPU it has no
    kernels for bfloat16, whose graphs are run in another way."""
    names = [DENSE, PORTABLE] if precision != "bf16" else []
    if (folder / RUNTIME).is_file():
        library, reason = operator_or_reason()
        names += [RUNTIME] if library is not None else []
        if library is None:
            log.warning("%s was written and not tried, since the operator's library cannot be had here: %s", RUNTIME, reason)
    for name in names:
        try:
            with OnnxRunner(folder / name):
                pass
        except UserError as error:
            raise UserError(
                f"ONNX Runtime cannot load the exported {name} ({reason_of(error.__cause__ or error)}): it has no kernel for "
                "something that the model computes, such as the bfloat16 of an autocast in its forward; take that out"
            ) from error


def _calibration_data(moee: MoeeModel, report: Reporter) -> ImageSet:
    try:
        data = moee.record.images("train", report=report)
    except UserError as error:
        raise UserError(f"int8 needs calibration images: {error}; give them with --data") from error
    say_read(train=data)
    return data


def read_quantization(manifest: dict[str, Any], model: str) -> Quantization | None:
    """What `export.json` says of `model` (dense, moee); None for a graph without int8. Raises `UserError` if that is nonsense."""
    if manifest.get("precision") not in INT8:
        return None
    try:
        return Quantization.model_validate(manifest["quantization"][model])
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{MANIFEST} does not say how its int8 graphs are quantised; export again") from error


def portable_forms(moee: MoeeModel, shape: Shape) -> dict[str, Form]:
    """The portable form of each layer whose kind has several."""
    layers = {name: layer for name, layer in routed_layers(moee.model).items() if form_of(layer).several}
    if not layers:
        return {}
    tokens = tokens_per_image(merging_like(moee.layout(), moee.model), layers, shape)
    return {name: cast(Form, form_of(layer).portable(layer, tokens[name])) for name, layer in layers.items()}


def _latest_cost(moee: MoeeModel) -> dict[str, Any] | None:
    """MACs and parameters as the last command that changed the weights measured them."""
    return latest(moee.info).get("cost")
