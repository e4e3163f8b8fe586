"""Makes docs/results/methods_table.md: every method at equal MACs, on several models and domains.

python scripts/methods_table.py --work runs/methods --out docs/results/methods_table.md --minutes 60

What is in the work folder is not made again, and an interrupted row is gone on from. The page holds what is there.
"""

import argparse
import sys
import time
from pathlib import Path

from exporter.engines.environment import environment
from exporter.pretrained import resolve
from exporter.timing.methods_page import CASES, header
from moee.planning.table import ROWS, fill, page
from moee.progress import to_stderr
from moee.stages.session import Session
from moee.store.atomic import write_text

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--work", type=Path, default=Path("runs/methods"))
parser.add_argument("--out", type=Path, default=Path("docs/results/methods_table.md"))
parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further row after so many (no limit)")
parser.add_argument("--models", help="comma-separated models, of those on the page (all)")
parser.add_argument("--rows", help=f"comma-separated rows, of {', '.join(row.name for row in ROWS)} (all)")
args = parser.parse_args()
started, report = time.monotonic(), to_stderr()
models = args.models.split(",") if args.models else [case.model for case in CASES]
rows = [row for row in ROWS if not args.rows or row.name in args.rows.split(",")]
over = lambda: time.monotonic() - started > 60 * args.minutes  # noqa: E731
whole = True
for case in CASES:
    if case.model in models:
        session = lambda case=case: Session(resolve(case.model, case.data, report=report), case.data, report=report)  # noqa: E731
        whole = fill(case, rows, args.work, session, over=over, report=report) and whole
cpu = environment()["cpu"]
write_text(args.out, page(CASES, args.work, header(cpu["model"] or cpu["machine"])))
sys.exit(0 if whole else 3)
