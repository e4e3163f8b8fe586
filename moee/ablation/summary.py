"""What an ablation found, as numbers (`ablation.json`) and as text (`table.md`)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from moee.ablation.grid import TABLES, AblationConfig
from moee.ablation.verdict import METRICS, Result, Verdict, judge
from moee.measure.accuracy import Interval, seeds_interval

SCHEMA = "moee.ablation/1"
FIGURES = ("accuracy", "class_cosine", "token_cosine", "macs_change", "params_change")


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and sample standard deviation of what is there; None for nothing."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "deviation": statistics.stdev(known) if len(known) > 1 else 0.0}


def summarise(setup: dict[str, Any], ablation: AblationConfig, results: list[Result]) -> dict[str, Any]:
    """The body of `ablation.json`: per table, row, compensation and point of its sweep, figures over the seeds; verdicts."""
    tables: dict[str, Any] = {}
    for key in ablation.tables:
        mine = [(cell, result) for cell, result in results if cell.table == key]
        groups: dict[tuple[str, str, str], list[Result]] = {}
        for cell, result in mine:
            groups.setdefault((cell.row, cell.compensation, cell.point), []).append((cell, result))
        tables[key] = {
            "title": TABLES[key].title,
            "note": TABLES[key].note,
            "rows": [
                {
                    "row": row, "compensation": compensation, "point": point,
                    "dense_cells": sum(result["status"] == "dense" for _, result in group),
                    **{name: _spread(result.get(name) for _, result in group) for name in FIGURES},
                    "accuracy_interval": seeds_interval([result for _, result in group], "accuracy"),
                    "experts": _spread(_mean_experts(result) for _, result in group),
                }
                for (row, compensation, point), group in groups.items()
            ],
        }  # fmt: skip
    dense = next((result["dense_accuracy"] for _, result in results if result.get("dense_accuracy") is not None), None)
    why = next((result["no_accuracy"] for _, result in results if result.get("no_accuracy")), "")
    metrics = [m for m in METRICS if any(result.get(m) is not None for _, result in results)]
    verdicts = [v.to_json() for metric in metrics for v in judge(results, metric)]
    return {
        "schema": SCHEMA, "setup": setup, "ablation": ablation.model_dump(mode="json"), "dense_accuracy": dense,
        "dense_accuracy_interval": seeds_interval([result for _, result in results], "dense_accuracy"), "no_accuracy": why,
        "tables": tables, "verdicts": verdicts,
    }  # fmt: skip


def _mean_experts(result: dict[str, Any]) -> float | None:
    return statistics.fmean(result["experts"]) if result.get("experts") else None


def verdict_lines(verdicts: list[dict[str, Any]]) -> list[str]:
    """One sentence an ordering: the claim as published, and what was found here."""
    lines = []
    for v in verdicts:
        pairs = "; ".join(
            f"{p['better']} − {p['worse']}: " + ("not compared" if p["mean"] is None else f"{p['mean']:+.4f} ({p['verdict']})")
            for p in v["pairs"]
        )
        where = f"Table {v['table']}, {v['claim']}, compensation {v['compensation']}, by {v['metric']}"
        lines.append(f"{where}: **{v['verdict']}**. {pairs}")
    return lines


def markdown(summary: dict[str, Any]) -> str:
    """`table.md`: set-up, verdicts, one table after another."""
    setup, ablation = summary["setup"], summary["ablation"]
    dense = summary["dense_accuracy"]
    lines = [
        f"# Ablation: {setup['model']} on {setup['data']}", "",
        f"{ablation['seeds']} seeds, mean ± standard deviation over them; {ablation['tokens']} calibration tokens a layer, "
        f"{ablation['cluster_tokens']} of them clustered on {ablation['components']} principal components; "
        f"{ablation['statistics']} statistics. Measured on CPU."
        + (f" Dense accuracy {dense:.2%}{_within(summary['dense_accuracy_interval'])}." if dense is not None else "")
        + (f" Accuracy is not compared: {summary['no_accuracy']}." if summary["no_accuracy"] else ""), "",
    ]  # fmt: skip
    for row, reason in summary.get("left_out", {}).items():
        lines += [f"Left out: {row}. {reason}.", ""]
    if summary["verdicts"]:
        lines += ["## Published orderings", ""]
        lines += [
            "Rows are compared at equal MACs (linear interpolation along the kept share). Reproduced: the mean difference over "
            "the seeds is positive and larger than its standard deviation; reversed: negative and larger; undecided: "
            "between, or one seed.",
            "",
            "| table | published ordering | compensation | " + " | ".join(f"by {m}" for m in _metrics(summary)) + " |",
            "|" + "---|" * (3 + len(_metrics(summary))),
        ]  # fmt: skip
        lines += _verdict_rows(summary) + [""]
        lines += [f"- {line}" for line in verdict_lines(summary["verdicts"])] + [""]
    for key, table in summary["tables"].items():
        name = f"Figure {key[3:]}" if key.startswith("fig") else f"Table {key}"
        lines += [f"## {name}: {table['title']}", ""] + ([table["note"], ""] if table["note"] else [])
        head = "| row | compensation | kept | accuracy (95 % interval) | class cosine | MACs | parameters | experts |"
        lines += [head, "|" + "---|" * 8]
        for row in table["rows"]:
            cells = [
                _percent(row["accuracy"]) + _within(row["accuracy_interval"]), _number(row["class_cosine"]),
                _change(row["macs_change"]), _change(row["params_change"]),
                "–" if row["experts"] is None else f"{row['experts']['mean']:.1f}",
            ]  # fmt: skip
            note = f" (all layers dense in {row['dense_cells']} runs)" if row["dense_cells"] else ""
            lines.append(f"| {row['row']}{note} | {row['compensation']} | {row['point']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _metrics(summary: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(v["metric"] for v in summary["verdicts"]))


def _verdict_rows(summary: dict[str, Any]) -> list[str]:
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for v in summary["verdicts"]:
        found.setdefault((v["table"], v["claim"], v["compensation"]), {})[v["metric"]] = v["verdict"]
    metrics = _metrics(summary)
    return [f"| {' | '.join(key)} | {' | '.join(by.get(m, '–') for m in metrics)} |" for key, by in found.items()]


def _percent(value: dict[str, float] | None) -> str:
    return "–" if value is None else f"{value['mean']:.2%} ± {value['deviation']:.2%}"


def _within(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval[0]:.1%} to {interval[1]:.1%})"


def _number(value: dict[str, float] | None) -> str:
    return "–" if value is None else f"{value['mean']:.4f} ± {value['deviation']:.4f}"


def _change(value: dict[str, float] | None) -> str:
    return "–" if value is None else f"{value['mean']:+.1%}"


__all__ = ["SCHEMA", "Verdict", "markdown", "summarise", "verdict_lines"]
