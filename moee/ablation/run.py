"""An ablation from its set-up to its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moee.ablation.cells import fitting_cells, run_cells, setup_of
from moee.ablation.grid import AblationConfig
from moee.ablation.summary import markdown, summarise
from moee.progress import Reporter, silent
from moee.stages.session import Session
from moee.store.artifact import tool_versions, write_json
from moee.store.atomic import write_text


def run_ablation(session: Session, ablation: AblationConfig, out: Path | str, report: Reporter = silent) -> dict[str, Any]:
    """Run the cells that `out` lacks, write `ablation.json` and `table.md` there, and return the body of `ablation.json`.

    Raises `UserError` when `out` holds an ablation of another set-up, and names the difference.
    """
    out = Path(out)
    cells, left_out = fitting_cells(session, ablation)
    results = run_cells(session, ablation, cells, out, report)
    made = summarise(setup_of(session, ablation), ablation, results)
    summary = {**made, "left_out": left_out, "data_read": session.data_facts(), "tools": tool_versions()}
    write_json(out / "ablation.json", summary)
    write_text(out / "table.md", markdown(summary) + "\n")
    return summary
