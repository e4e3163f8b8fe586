"""The whole pipeline again and again in one process: `python -m tests.reliability.soak FOLDER [COMMAND ...] --rounds 20`, or
`--minutes 30` (`make soak`), which ends with a verdict and exit code 1 where something grew.

After each round one JSON line: resident memory in MiB, open file handles, threads, files in the temporary folder. The memory is
read after a collection and with the allocator's free pages given back, so that what is left is in use.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np

from moee.store.scratch import SCRATCH

WARM_UP = 8  # rounds until the allocator and the caches of torch have grown
EXPORT_SLOPE_MIB = 1.5  # a round with exports: 1.0 was measured, and none of it in the other commands

def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.reliability.soak", description=__doc__)
    parser.add_argument("folder", type=Path, help="an empty folder, where the commands work")
    parser.add_argument("commands", nargs="*", help="of tests.reliability.commands (the whole pipeline)")
    parser.add_argument("--rounds", type=int, default=sys.maxsize)
    parser.add_argument("--minutes", type=float, help="go on for so long, and judge")
    args = parser.parse_args()
    folder, names = args.folder.resolve(), args.commands
    os.chdir(folder)
    (folder / "tmp").mkdir()
    tempfile.tempdir = str(folder / "tmp")
    os.environ.update(MOEE_CACHE=str(folder / "cache"), TMPDIR=str(folder / "tmp"))
    import torch

    torch.set_num_threads(1)
    from exporter.cli import main as moee
    from tests.plugins import built
    from tests.reliability.commands import COMMANDS
    from tests.reliability.tiny_vit import write_images, write_weights

    write_images(folder / "images")
    write_weights(folder / "w.safetensors")

    def run(name: str) -> None:
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            code = moee(COMMANDS[name].forced())
        if code != 0:
            raise SystemExit(f"{name}: exit {code}\n{said.getvalue()}")

    if names and "verify" in names:  # what it needs, once
        run("extract")
        run("export")
    if not names:
        os.link(built.plugin(), folder / "plugin.so")
    rounds: list[dict[str, float]] = []
    started = time.monotonic()
    while len(rounds) < args.rounds and (args.minutes is None or time.monotonic() < started + 60 * args.minutes):
        for name in names or ["extract", "finetune", "export", "verify", "bench", "report", "build"]:
            run(name)
        rounds.append(usage(folder))
        print(json.dumps({"repeat": len(rounds) - 1, **rounds[-1]}), flush=True)
    code = 0
    if args.minutes is not None:
        text, code = verdict(rounds)
        print(text, flush=True)
    os._exit(code)


def verdict(rounds: list[dict[str, float]]) -> tuple[str, int]:
    """What grew after `WARM_UP` rounds, and the exit code: too few rounds show nothing, and do not pass."""
    after = rounds[WARM_UP:]
    if len(after) < 3:
        return f"{len(rounds)} rounds show nothing, since {WARM_UP} warm up; give more --minutes", 1
    slope = float(np.polyfit(range(len(after)), [r["rss_mib"] for r in after], 1)[0])
    grew = [name for name in ("handles", "threads", "temporary") if len({r[name] for r in after}) != 1]
    grew += ["scratch"] * any(r["scratch"] for r in rounds) + ["rss_mib"] * (slope >= EXPORT_SLOPE_MIB)
    text = f"{len(rounds)} rounds; memory {slope:+.2f} MiB a round (at most {EXPORT_SLOPE_MIB:g})"
    return f"{text}; grew: {', '.join(grew) or 'nothing'}", 1 if grew else 0


def usage(folder: Path) -> dict[str, float]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "temporary": len(os.listdir(folder / "tmp")),  # torch's tracer keeps a folder of its own there
        "scratch": sum(name.startswith(SCRATCH) for name in os.listdir(folder / "tmp")),
    }


if __name__ == "__main__":
    main()
