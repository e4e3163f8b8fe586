"""Ablations: the paper's tables and sweeps at the scale of one machine, resumable, with a verdict on each published ordering.

Imports store, calibrate, mlps, places, measure, methods and stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moee.ablation.cells import run_cells, setup_of
from moee.ablation.grid import TABLES, AblationConfig, make_ablation_config
from moee.ablation.summary import SCHEMA, markdown, summarise, verdict_lines
from moee.progress import Reporter, silent
from moee.stages.session import Session
from moee.store.artifact import tool_versions, write_json, write_text

__all__ = ["SCHEMA", "TABLES", "AblationConfig", "make_ablation_config", "markdown", "run_ablation", "verdict_lines"]


def run_ablation(session: Session, ablation: AblationConfig, out: Path | str, report: Reporter = silent) -> dict[str, Any]:
    """Run the cells that `out` lacks, write `ablation.json` and `table.md` there, and return the former's body.

    Raises `UserError` when `out` holds an ablation of another set-up, and names the difference.
    """
    out = Path(out)
    results = run_cells(session, ablation, out, report)
    made = summarise(setup_of(session, ablation), ablation, results)
    summary = {**made, "data_read": session.data_facts(), "tools": tool_versions()}
    write_json(out / "ablation.json", summary)
    write_text(out / "table.md", markdown(summary) + "\n")
    return summary
