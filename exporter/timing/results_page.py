"""docs/results/speed.md: static pruning and experts of the same MACs beside the dense model, whole and MLP by MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exporter.timing.ffn_bench import LayersReached
from exporter.timing.side_by_side import Reached
from exporter.verdict import Verdict

# Run in this order, each unless its folder is there: cut, then exported.
COMMON = "--data photo-crops --target-macs 0.645 --tokens 20000 --refit-tokens 6000"
EXPERTS = "--clustering kmeans --components 50 --cluster-tokens 6000 --clusters"
MODELS = ("static", "routed", "routed32")
STEPS = (
    ("static", f"extract dinov2-s {COMMON} --method static --out {{work}}/static"),
    ("routed", f"extract dinov2-s {COMMON} {EXPERTS} 8 --out {{work}}/routed"),
    ("routed32", f"extract dinov2-s {COMMON} {EXPERTS} 32 --out {{work}}/routed32"),
    ("static-export", "export {work}/static --out {work}/static-export"),
    ("routed-export", "export {work}/routed --runtime-ops --out {work}/routed-export"),
    ("routed32-export", "export {work}/routed32 --runtime-ops --out {work}/routed32-export"),
)  # fmt: skip
HEADER = """# Speed side by side

Made by `make results`, which runs the commands below and times everything in turns in one process. DINOv2 ViT-S/14
on photo-crops at 112 pixels (65 tokens an image), no tuning. *Measured on CPU*: {cpu}, {cores} cores, {threads} threads,
ONNX Runtime. Load of the machine before and after: {before} and {after}; other work than this shows in the intervals.

`static` keeps the same neurons for every token; `routed` has eight experts a layer and `routed32` thirty-two, as an operator
of ONNX Runtime. Ideal is the dense model's MACs over the model's; realised is the speed-up over the ideal. The interval is
that of 99 % ([bench.md](../bench.md)).

{commands}
"""


def page(
    models: Sequence[Reached], layers: Sequence[LayersReached], before: dict[str, Any], after: dict[str, Any], threads: int
) -> str:
    """The page as Markdown. `before` and `after`: `exporter.engines.environment.environment()`."""
    cpu = before["cpu"]
    commands = "\n".join(f"    moee {command.format(work='runs/results')}" for _, command in STEPS)
    parts = [
        HEADER.format(
            cpu=cpu["model"] or cpu["machine"], cores=cpu["cores"], threads=threads, before=cpu["load_1min"],
            after=after["cpu"]["load_1min"], commands=commands,
        ),
        "## The whole model\n",
        "    moee bench runs/results/static-export --beside runs/results/routed-export "
        "--beside runs/results/routed32-export --batches 1,8,32\n",
        "| batch | model | dense ms | ms | speed-up (99 % interval) | ideal | realised |\n|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in models:
        ideal, share = (f"{r.ideal:.2f}x", f"{r.share:.2f}") if r.ideal and r.share else ("–", "–")
        name = r.name.removesuffix("-export")
        parts.append(f"| {r.batch} | {name} | {r.dense_p50_ms:.1f} | {r.p50_ms:.1f} | {_span(r.verdict)} | {ideal} | {share} |")
    parts += [
        "\n## Its MLPs alone\n",
        "    python scripts/bench_ffn.py runs/results/static runs/results/routed runs/results/routed32 --batches 1,8,32\n",
        "| batch | tokens | model | speed-up (99 % interval) | ideal | realised |\n|---|---|---|---|---|---|",
    ]
    for f in layers:
        reached = f"{f.verdict.ratio / f.ideal:.2f}"
        parts.append(f"| {f.batch} | {f.tokens} | {f.name} | {_span(f.verdict)} | {f.ideal:.2f}x | {reached} |")
    return "\n".join(parts) + "\n"


def _span(verdict: Verdict) -> str:
    interval = f"{verdict.low:.2f} to {verdict.high:.2f}" if verdict.decidable else "too few rounds for an interval"
    return f"{verdict.ratio:.2f}x ({interval})"
