"""Compare clustering libraries on the same activations, in one run: time, peak memory, agreement and tree weight.

    python scripts/bench_clustering.py --activations block5.npy --sizes 1000,2000,4000,8000,16000 --full 126080

`--activations` takes an [N, F] .npy file; without it the demo model's activations on its photographs are collected.
Every figure comes from its own process, one after another. A library that is absent, or that its own smaller sizes
predict to take longer than `--limit` seconds, is skipped and the table says so. Rows are appended to
`<out>/clustering.jsonl` as they come; `--report` only draws the table and the plot from that file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LIBRARIES = ("moee", "hdbscan", "fast_hdbscan", "hdbscan-rs", "sklearn-auto", "sklearn-brute")
MODULES = {"hdbscan-rs": "hdbscan_rs", "sklearn-auto": "sklearn", "sklearn-brute": "sklearn"}
GROWTH = 2.0  # exponent with which a library's time is predicted from its last size


def cluster(library: str, x: np.ndarray, size: int, samples: int) -> tuple[np.ndarray, float | None, dict[str, Any]]:
    """Labels, tree weight where the library reveals it, and details. `samples` counts as hdbscan counts."""
    if library == "moee":
        from moee.clustering.hdbscan import HDBSCAN

        stages: dict[str, float] = {}
        before = time.perf_counter()

        def progress(done: int, total: int, message: str) -> None:
            nonlocal before
            now = time.perf_counter()
            stages[message] = stages.get(message, 0.0) + now - before
            before = now

        fit = HDBSCAN(size, samples, progress=progress).fit(x)
        return fit.labels_.numpy(), float(fit.minimum_spanning_tree_.weights.sum()), {"stages_s": stages}
    if library == "hdbscan":
        import hdbscan

        fit = hdbscan.HDBSCAN(size, samples, approx_min_span_tree=False, gen_min_span_tree=True, core_dist_n_jobs=2)
        fit.fit(x)
        return fit.labels_, float(fit._min_spanning_tree[:, 2].sum()), {}
    if library == "fast_hdbscan":
        import fast_hdbscan

        fit = fast_hdbscan.HDBSCAN(min_cluster_size=size, min_samples=samples).fit(x)
        return fit.labels_, float(np.asarray(fit._min_spanning_tree)[:, 2].sum()), {}
    if library == "hdbscan-rs":
        import hdbscan_rs

        return np.asarray(hdbscan_rs.HDBSCAN(size, samples + 1).fit_predict(x.astype(np.float64))), None, {}
    from sklearn.cluster import HDBSCAN as Sklearn

    fit = Sklearn(size, samples + 1, algorithm=library.split("-")[1], n_jobs=2, copy=True)  # counts the point itself
    return fit.fit_predict(x), None, {}


def peak_mib() -> float:
    """Peak resident memory of this process since `reset_peak`, MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def reset_peak() -> float:
    """Start a new peak; returns the resident memory now, MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Run one task in this process."""
    import torch

    x = np.ascontiguousarray(np.load(task["data"], mmap_mode="r")[: task["n"], : task["d"]]).astype(np.float32)
    if task["library"] == "product":
        return task | product_pass(torch.from_numpy(x), task["share"])
    try:
        cluster(task["library"], x[:100], 5, 5)  # imports and compiles
    except ValueError:
        pass  # too degenerate a sample for one library is no reason not to time it
    start_mib = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    labels, weight, details = cluster(task["library"], x, task["min_cluster_size"], task["min_samples"])
    task |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "peak_mib": peak_mib() - start_mib}
    np.save(task["labels"], labels)
    return task | {"weight": weight, "clusters": int(labels.max()) + 1, "noise": float((labels < 0).mean())} | details


def product_pass(x: Any, share: float, block: int = 4096) -> dict[str, Any]:
    """Time `share` of one blocked float32 product X Xᵀ (all N² entries, nothing else done with them)."""
    import torch

    out = torch.empty(block, block)
    starts = range(0, len(x), block)
    wall, cpu, done = time.perf_counter(), time.process_time(), 0
    for start in list(starts)[: max(1, round(len(starts) * share))]:
        rows = x[start : start + block]
        for other in starts:
            columns = x[other : other + block]
            torch.mm(rows, columns.T, out=out[: len(rows), : len(columns)] if len(columns) < block else out[: len(rows)])
            done += len(rows) * len(columns)
    scale = len(x) ** 2 / done
    return {"wall_s": (time.perf_counter() - wall) * scale, "cpu_s": (time.process_time() - cpu) * scale}


def spawn(task: dict[str, Any]) -> dict[str, Any]:
    """Run one task in a fresh process."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return task | {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace, emit: Callable[[dict[str, Any]], None]) -> None:
    """All measurements, emitted one by one."""
    from sklearn.metrics import adjusted_rand_score

    folder = Path(tempfile.mkdtemp(prefix="bench-clustering-"))
    data = args.activations or collect(folder, max([args.full, *args.sizes]))
    shape = np.load(data, mmap_mode="r").shape
    base = {"data": str(data), "min_cluster_size": args.min_cluster_size, "min_samples": args.min_samples}
    for d in args.dims:
        last: dict[str, tuple[int, float]] = {}
        for n in args.sizes:
            reference: dict[str, np.ndarray] = {}
            if n > shape[0] or d > shape[1]:
                continue
            for library in args.libraries:
                row = base | {"library": library, "n": n, "d": d, "labels": str(folder / "labels.npy")}
                if importlib.util.find_spec(MODULES.get(library, library)) is None:
                    emit(row | {"skipped": "not installed"})
                    continue
                if library in last:
                    guess = last[library][1] * (n / last[library][0]) ** GROWTH
                    if guess > args.limit:
                        emit(row | {"skipped": f"predicted {guess:.0f} s"})
                        continue
                row = spawn(row)
                if "error" not in row:
                    last[library] = (n, row["wall_s"])
                    labels = np.load(row["labels"])
                    reference[library] = labels
                    for other in ("hdbscan", "moee"):
                        if other in reference and other != library:
                            row[f"ari_{other}"] = adjusted_rand_score(reference[other], labels)
                emit(row)
    if args.full:
        row = base | {"n": args.full, "d": shape[1], "labels": str(folder / "labels.npy")}
        emit(spawn(row | {"library": "product", "share": args.share}))  # before and after: the machine may be shared
        emit(spawn(row | {"library": "moee"}))
        emit(spawn(row | {"library": "product", "share": args.share}))


def collect(folder: Path, rows: int) -> Path:
    """Hidden activations [rows, H] of the middle block of the demo's model on its photographs, as an .npy file."""
    from exporter.pretrained import resolve
    from moee.calibrate.calibration import collect_tokens, hidden_activations
    from moee.data.built_in import CALIBRATION_PHOTOS
    from moee.data.sources import load_data
    from moee.data.transform import model_transform
    from moee.mlps.find import find_ffns
    from moee.models.model import load_model

    model = load_model(resolve("dinov2-s", "photos"))
    transform = model_transform(model)
    tokens = transform.shape[1] // 14 * (transform.shape[2] // 14) + 1  # an image, at patch size 14
    crops = -(-rows // (tokens * len(CALIBRATION_PHOTOS)))
    ffns = find_ffns(model).ffns
    ffn = ffns[len(ffns) // 2]
    sampled = collect_tokens(model, [ffn], load_data(f"photos:{crops}", transform), folder, rows)[0]
    out = folder / "activations.npy"
    np.save(out, hidden_activations(ffn, sampled.load()).numpy().astype(np.float16))
    return out


def report(rows: list[dict[str, Any]], out: Path) -> None:
    """Write clustering.md (table) and clustering.svg (log-log plot)."""
    lines = [
        "| N | D | library | time s | CPU s | peak MiB beyond input | ARI to hdbscan | ARI to moee | tree weight | note |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    for row in sorted(rows, key=lambda r: (r["d"], r["n"])):
        note = row.get("skipped") or row.get("error") or ""
        if row["library"] == "product":
            note = f"one float32 pass over all N² entries, from {row.get('share', 1):.0%} of it"
        cells = [
            str(row["n"]), str(row["d"]), row["library"], cell(row.get("wall_s"), ".2f"), cell(row.get("cpu_s"), ".1f"),
            cell(row.get("peak_mib"), ".0f"), cell(row.get("ari_hdbscan"), ".4f"), cell(row.get("ari_moee"), ".4f"),
            cell(row.get("weight"), ".9g"), note,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    (out / "clustering_table.md").write_text("# Clustering: all settings\n\n" + "\n".join(lines) + "\n")
    most = max(row["d"] for row in rows)
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["d"] == most and "wall_s" in row:
            series.setdefault(row["library"], []).append((row["n"], row["wall_s"]))
    (out / "clustering.svg").write_text(loglog(series, f"Rows N ({most} features)", "Seconds"))


def loglog(series: dict[str, list[tuple[float, float]]], x_title: str, y_title: str) -> str:
    """A log-log line plot as SVG text."""
    points = [p for line in series.values() for p in line]
    ends = [(math.log10(min(p[a] for p in points)), math.log10(max(p[a] for p in points))) for a in (0, 1)]
    (x0, x1), (y0, y1) = ((math.floor(lo * 4) / 4, math.ceil(hi * 4) / 4 + 1e-9) for lo, hi in ends)
    width, height, left, top = 560, 360, 70, 20

    def place(p: tuple[float, float]) -> tuple[float, float]:
        across, up = (math.log10(p[0]) - x0) / (x1 - x0), (math.log10(p[1]) - y0) / (y1 - y0)
        return left + across * width, top + (1 - up) * height

    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 130} {top + height + 50}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for axis, (lo, hi) in enumerate(((x0, x1), (y0, y1))):
        for decade in range(math.floor(lo), math.ceil(hi) + 1):
            for digit in (1, 2, 5):
                value = digit * 10.0**decade
                if not lo <= math.log10(value) <= hi:
                    continue
                at = place((value, 10**y0) if axis == 0 else (10**x0, value))[axis]
                line = (at, top, at, top + height) if axis == 0 else (left, at, left + width, at)
                svg.append('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="#ddd"/>'.format(*line))
                spot = f'x="{at:.1f}" y="{top + height + 16}" text-anchor="middle"' if axis == 0 else (
                    f'x="{left - 6}" y="{at + 4:.1f}" text-anchor="end"'
                )  # fmt: skip
                svg.append(f"<text {spot}>{value:g}</text>")
    svg.append(f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">{x_title}</text>')
    svg.append(f'<text x="14" y="{top + height / 2}" transform="rotate(-90 14 {top + height / 2})">{y_title}</text>')
    colours = ("#0b6", "#c22", "#26c", "#e80", "#808", "#555", "#0aa")
    for colour, (name, line) in zip(colours, series.items(), strict=False):
        spots = [place(p) for p in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        svg.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        svg += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        svg.append(f'<text x="{spots[-1][0] + 8:.1f}" y="{spots[-1][1] + 4:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*svg, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser.add_argument("--activations", type=Path, help="[N, F] .npy file, any float type")
    parser.add_argument("--sizes", type=integers, default=[1000, 2000, 4000, 8000])
    parser.add_argument("--dims", type=integers, default=[2, 16, 384, 1536])
    parser.add_argument("--full", type=int, default=0, help="also cluster this many rows, between two timed product passes")
    parser.add_argument("--share", type=float, default=0.25, help="part of a product pass that is timed, then scaled")
    parser.add_argument("--libraries", type=lambda text: text.split(","), default=list(LIBRARIES))
    parser.add_argument("--min-cluster-size", type=int, default=100)
    parser.add_argument("--min-samples", type=int, default=5)
    parser.add_argument("--limit", type=float, default=600, help="skip what is predicted to take longer, seconds")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--report", action="store_true", help="only redraw the table and the plot")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(json.loads(args.task))))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "clustering.jsonl"
    if not args.report:
        with log.open("a") as file:

            def emit(row: dict[str, Any]) -> None:
                row = {key: value for key, value in row.items() if key not in ("data", "labels")}
                row |= {"machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"}
                print(json.dumps(row), file=file, flush=True)
                print(json.dumps(row), flush=True)

            run(args, emit)
    report([json.loads(line) for line in log.read_text().splitlines()], args.out)


if __name__ == "__main__":
    main()
