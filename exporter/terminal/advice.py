"""What a result means and what to do next, in one or two sentences, from its figures alone; what was not measured is said so."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from exporter.terminal.ui import percent

LEAST_SAVED = 0.1  # of the MACs: routing and sorting the tokens costs a model about as much time (docs/results/defaults.md)
MOST_LOST_PP = 1.0  # points of accuracy, and
LEAST_COSINE = 0.95  # cosine of a model's outputs, beyond which tuning comes before the export
SMALLER = "try --method static --target-macs 0.7"


def after_extract(info: dict[str, Any], out: str, words: Sequence[str] = (), less: str = "") -> str:
    """`info` of the artifact that lies at `out`; `words`: flags that later commands want again; `less`: the flag of the method by
    which it saves less, empty where there is none."""
    stage = info["stages"]["extracted"]
    share = _saved(stage)
    experts = max((layer["experts"] for layer in info["layers"]), default=0)
    if share <= 0:
        return f"needs {-share:.0%} more MACs than dense and will be slower: {SMALLER}"
    saved = f"saves {_whole_percent(share)} of the MACs"
    if share < LEAST_SAVED and experts > 1:
        return f"{saved}, less than routing costs, and will be slower than dense: {SMALLER}"
    kept, poor = _kept(stage["retention"])
    if poor:
        cure = _command("finetune", out, *words, "--out", "tuned")
        return f"{saved}, but {kept}: next tune it, {cure}, or save less" + (f" ({less})" if less else "")
    return f"{saved}; {kept}. How fast it is was not measured; next: {_command('export', out, *words, '--out', 'export')}"


def after_finetune(info: dict[str, Any], path: str, out: str, words: Sequence[str] = ()) -> str:
    """`info` of the artifact at `out`, which was tuned from the one at `path`."""
    stage = info["stages"]["tuned"]
    before, *after = stage["losses"]["validation"]
    best, exported = stage["best_epoch"], _command("export", path, *words, "--out", "export")
    if best == 0 and before == 0:
        return f"there was nothing to learn: {path} answers as the dense model does; next: {exported}"
    if best == 0:
        low = stage["config"]["lr"] / 10
        return (
            f"nothing was learned: the validation loss was {before:.3g} at the start and {min(after):.3g} at best after it, so "
            f"{out} has the weights of {path}; try --lr {low:.1g}, or go on with {path}: {exported}"
        )
    learned = f"epoch {best} of {len(after)} was best: validation loss {before:.3g} to {after[best - 1]:.3g}"
    kept, poor = _kept(stage["retention"])
    more = "; it was still falling, so more --epochs may help" if best == len(after) and poor else ""
    return f"{learned}; {kept}{_fell(info['stages'])}{more}. Next: {_command('export', out, *words, '--out', 'export')}"


def _fell(stages: dict[str, Any]) -> str:
    """What the accuracy was before the tuning, where that was more on the same held-out images: a loss may fall beside it."""
    tuned, earlier = stages["tuned"], [(name, stage) for name, stage in stages.items() if name != "tuned"]
    if not earlier or earlier[-1][1].get("held_out") != tuned.get("held_out"):
        return ""
    name, stage = earlier[-1]
    before, now = (each["retention"].get("accuracy") for each in (stage, tuned))
    return f", less than the {percent(before)} as {name}" if None not in (before, now) and before > now else ""


def after_shrink(info: dict[str, Any], out: str, words: Sequence[str] = ()) -> str:
    """`info` of the artifact at `out`, whose experts were made fewer."""
    stage = info["stages"]["shrunk"]
    kept, poor = _kept(stage["retention"])
    fewer = sum(before - after for before, after in (layer["experts"] for layer in stage["layers"]))
    if not fewer:
        return f"no expert could be spared, so {out} answers as before; allow more with --tolerance, or give --experts"
    cure = _command("finetune", out, *words, "--out", "tuned") if poor else _command("export", out, *words, "--out", "export")
    return f"{fewer} experts fewer; {kept}. Next: {cure}"


def after_bench(result: Any, path: str, words: Sequence[str] = ()) -> str:
    """`result`: the `LatencyResult` of the export at `path`."""
    ratio, verdict = f"{result.verdict.ratio:.2f}x as fast as dense at batch {result.batch}", result.verdict
    where = f"measured with {result.runtime}"
    if verdict.winner == "moee":
        return f"{ratio}, {where}; next: {_command('bundle', path, *words, '--sm', 'orin', '--out', 'bundle')}"
    if verdict.winner == "dense":
        ideal = result.ideal_speedup
        if ideal is not None and ideal < 1 / (1 - LEAST_SAVED):
            return f"{ratio}, {where}: it saves too few MACs to be faster; extract again, {SMALLER}"
        allowed = f", while its MACs allow {ideal:.2f}x" if ideal is not None else ""
        cure = "try a larger --batch, or extract with fewer experts (--clusters) or one (--method static)"
        return f"{ratio}, {where}{allowed}: {cure}"
    if not verdict.decidable:
        return "whether it is faster is not known: time it longer, with --duration 30"
    return f"{ratio}, {where}: not to be told from dense; time it longer (--duration 30) or with a larger --batch"


def _saved(stage: dict[str, Any]) -> float:
    """The share of the dense MACs that a stage saves."""
    cost = stage["cost"]
    return 1 - cost["moee"]["macs"] / cost["dense"]["macs"]


def _whole_percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "less than 1 %"


def _kept(figures: dict[str, Any]) -> tuple[str, bool]:
    """How much of the dense model's answers is left, as a phrase, and whether that is little."""
    accuracy, dense, cosine = figures.get("accuracy"), figures.get("dense_accuracy"), figures.get("class_cosine")
    if accuracy is not None and dense is not None:
        return f"accuracy {percent(accuracy)}, dense {percent(dense)}", 100 * (dense - accuracy) > MOST_LOST_PP
    if cosine is None or not math.isfinite(cosine):
        return "how much it keeps is not known", False
    return f"its outputs' cosine to the dense ones is {cosine:.3f}, accuracy not known", cosine < LEAST_COSINE


def _command(*words: str) -> str:
    return f"moee {shlex.join(words)}"
