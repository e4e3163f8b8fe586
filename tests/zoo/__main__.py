"""The whole zoo, each model in a process of its own; writes docs/models.md. `make test-zoo`.

`python -m tests.zoo [WORD ...]` runs the models whose name or family holds one of the words, and then writes no page.
Exit code 1 if a model is wrong or ended in a way that nobody expected.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.zoo.one import UNEXPECTED, Outcome, write_images, write_outcome
from tests.zoo.page import PAGE, page
from tests.zoo.table import ENTRIES, Entry

LIMIT_S = 900.0  # of one model
ROOT = Path(__file__).resolve().parent.parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.zoo", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of the names or families of models (all)")
    parser.add_argument("--jobs", type=int, default=2, help="models side by side, a core each (2)")
    args = parser.parse_args(argv)
    chosen = [n for n, e in enumerate(ENTRIES) if not args.words or any(word in f"{e.family} {e.name}" for word in args.words)]
    started, outcomes = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="moee-zoo-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        data, processes = write_images(Path(folder) / "images"), loaded(Path(folder))
        tasks = {pool.submit(outcome_of, processes, number, data, Path(folder)): number for number in chosen}
        for task in as_completed(tasks):
            number = tasks[task]
            outcomes[ENTRIES[number]] = task.result()
            print(line(ENTRIES[number], task.result(), len(outcomes), len(chosen)), flush=True)
    counts = Counter(outcome.kind for outcome in outcomes.values())
    print(f"{', '.join(f'{n} {kind}' for kind, n in sorted(counts.items()))}; {time.perf_counter() - started:.0f} s")
    if not args.words:
        (ROOT / PAGE).write_text(page({entry: outcomes[entry] for entry in ENTRIES}), encoding="utf-8")
        print(f"written to {PAGE}")
    return 0 if all(outcome.good for outcome in outcomes.values()) else 1


def outcome_of(processes: ForkServerContext, number: int, data: Path, folder: Path) -> Outcome:
    """Run a model in a process; one that dies or does not end has an outcome too."""
    target = folder / f"{number}.json"
    process = processes.Process(target=write_outcome, args=(number, data, target))
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return Outcome(UNEXPECTED, reason=f"did not end within {LIMIT_S:.0f} s", seconds=LIMIT_S)
    if not target.is_file():
        log = target.with_suffix(".log")
        said = log.read_text(errors="replace")[-300:] if log.is_file() else ""
        return Outcome(UNEXPECTED, reason=f"the process ended with {process.exitcode}: {said}")
    return Outcome.read(target)


def loaded(folder: Path) -> ForkServerContext:
    """Processes that begin with torch, timm and ONNX loaded: starting them anew takes about as long as a small model's export."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    os.environ.update(threads, MOEE_CACHE=str(folder / "cache"), HF_HUB_OFFLINE="1")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.zoo.one", "torch.onnx._internal.exporter._core", "onnxscript.optimizer"])
    return processes


def line(entry: Entry, outcome: Outcome, done: int, total: int) -> str:
    cut = f" {outcome.cut}/{outcome.candidates}" if outcome.candidates else ""
    half = f" fp16 {outcome.half}" if outcome.half else ""
    return f"{done}/{total} {entry.family} {entry.title}: {outcome.kind}{cut}{half} {outcome.seconds:.0f} s {outcome.reason}"


if __name__ == "__main__":
    sys.exit(main())
