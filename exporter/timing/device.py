"""Latency of a candidate on a device: measured here on the CPU, modelled for a GPU by a roofline.

The model of a GPU takes, per operation, the larger of arithmetic time and memory time, and a launch: routed layers pay for
whole tiles (a tile of tokens an expert, rounded up), read every expert's weights, and take the fastest of the plugin's forms,
which have four launches a layer, two or one. It knows no caches and no overlap, so it
ranks candidates; it does not predict milliseconds. Its figures are always labelled `modelled`.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from exporter.forms.registry import form_of
from exporter.forms.roofline import BYTES, mlp_ms, operation_ms
from moee.layers.routed import routed_layers
from moee.measure.metrics import dense_macs, tokens_per_image
from moee.mlps.attention import macs_saved, narrow_attentions
from moee.mlps.find import find_ffns
from moee.models.ffn import FFN
from moee.models.model import Shape
from moee.planning.forms import Latency
from moee.stages.session import Session
from moee.store.scratch import temporary_folder
from moee.tokens.block import merging_like, token_merges
from plugins.devices import Profile, profile_named

CPU, CPU_RUNS = "cpu", 20
MERGE_LAUNCHES = 12  # of one merge: products, normalisation, two sorts, gathers, fused elementwise (assumed)


def timed_board(device: str) -> Profile | None:
    """The GPU of a device's name, which is modelled; None for the CPU, which is measured. Raises `UserError` for an unknown
    name, and for one that stands for several boards."""
    return None if device == CPU else profile_named(device, (CPU,))


def latency_of(device: str, session: Session, batch: int, precision: str = "fp32") -> Latency:
    """How `moee plan` times each model for a device; its name as `timed_board` takes it. `precision` is that of the graphs that
    are measured; the roofline knows float16 alone."""
    board = timed_board(device)
    if board is None:
        typed = "" if precision == "fp32" else f", {precision}"  # points of earlier versions were float32
        first = ExitStack()
        kept = first.enter_context(temporary_folder())

        def measured(model: nn.Module) -> dict[str, Any]:
            return measure_on_cpu(model, session, batch, precision, kept)

        weakref.finalize(measured, first.close)
        return Latency(f"{CPU}, batch {batch}{typed}", measured)
    facts = dense_facts(session.dense, session.transform.shape)
    return Latency(f"{board.name}, batch {batch}", lambda model: modelled(board, session.dense, model, facts, batch))


def measure_on_cpu(model: nn.Module, session: Session, batch: int, precision: str, kept: Path) -> dict[str, Any]:
    """p50 of a batch by ONNX Runtime on this CPU, dense and candidate interleaved in one process. The first export stays in the
    folder `kept`, and the dense graph of the others is its."""
    from exporter.graph.export import export
    from exporter.graph.runtime_graph import serves
    from exporter.timing.latency import bench
    from moee.artifacts.model import MoeeModel
    from moee.data.image_set import batches

    images = next(batches(session.held_out, batch)).images.numpy()
    first = kept / "export"
    with temporary_folder() as folder:
        again = first.is_dir()
        target = folder / "export" if again else first
        moee = MoeeModel(model.eval(), session.spec, None, session.source)
        own = model is session.dense
        dense_from, ops = first if again else None, serves(routed_layers(model), precision)
        export(moee, target, force=True, precision=precision, dense=own, dense_from=dense_from, runtime_ops=ops)
        result = bench(target, batch, runs=CPU_RUNS, images=images)
    return {
        "kind": "measured on CPU", "device": CPU, "batch": batch, "dense_ms": result.dense_ms["p50"],
        "moee_ms": result.moee_ms["p50"], "speedup": result.speedup, **result.verdict.span,
    }  # fmt: skip


@dataclass(frozen=True)
class DenseFacts:
    """What the roofline needs of a dense model on images of `shape`: its MLPs, their tokens an image, all its MACs an image."""

    shape: Shape
    ffns: dict[str, FFN]
    tokens: dict[str, int]
    macs: int


def dense_facts(dense: nn.Module, shape: Shape) -> DenseFacts:
    """Counted once a plan: it runs the model."""
    ffns = {f.name: f for f in find_ffns(dense, shape=shape, gated=True).ffns}
    return DenseFacts(shape, ffns, tokens_per_image(dense, list(ffns), shape), dense_macs(dense, shape))


def modelled(device: Profile, dense: nn.Module, model: nn.Module, facts: DenseFacts, batch: int) -> dict[str, Any]:
    """Dense and candidate in milliseconds by the roofline; MLPs one by one, the rest (attention too) as a product a block."""
    ffns, tokens, routed = facts.ffns, facts.tokens, routed_layers(model)
    dense_ffn = {
        n: mlp_ms(device, f.dim, f.hidden, tokens[n] * batch, f.neuron_macs // f.dim) for n, f in ffns.items()
    }
    rest_macs = facts.macs - sum(tokens[n] * f.macs for n, f in ffns.items())
    weights = sum(p.numel() for p in dense.parameters()) - sum(f.macs for f in ffns.values())
    activations = sum(12 * tokens[n] * batch * f.dim for n, f in ffns.items())  # about twelve passes a block
    narrowed = {n: sum(p.numel() for p in layer.parameters()) for n, layer in narrow_attentions(model).items()}
    lighter = sum(sum(p.numel() for p in dense.get_submodule(n).parameters()) - left for n, left in narrowed.items())
    rest = operation_ms(device, rest_macs * batch, BYTES * (weights + activations), 8 * len(ffns))
    merging, left, our_macs, launches = dense, tokens, rest_macs, 8 * len(ffns)
    if merges := token_merges(model):
        merging = merging_like(dense, model)
        left = tokens_per_image(merging, list(ffns), facts.shape)
        our_macs = dense_macs(merging, facts.shape) - sum(left[n] * f.macs for n, f in ffns.items())
        launches += MERGE_LAUNCHES * len(merges)
    moved = sum(12 * left[n] * batch * f.dim for n, f in ffns.items())
    our_macs -= macs_saved(model, facts.shape, merging)
    our_rest = operation_ms(device, our_macs * batch, BYTES * (weights - lighter + moved), launches)
    ours = sum(
        form_of(routed[n]).milliseconds(device, routed[n], left[n] * batch) if n in routed
        else mlp_ms(device, f.dim, f.hidden, left[n] * batch, f.neuron_macs // f.dim) for n, f in ffns.items()
    )  # fmt: skip
    return {
        "kind": "modelled", "device": device.name, "batch": batch, "dense_ms": rest + sum(dense_ffn.values()),
        "moee_ms": our_rest + ours, "speedup": (rest + sum(dense_ffn.values())) / (our_rest + ours),
    }  # fmt: skip
