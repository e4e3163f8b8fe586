"""The whole pipeline again and again in one process: `python -m tests.reliability.soak REPEATS FOLDER [COMMAND ...]`.

After each round one JSON line: resident memory in MiB, open file handles, threads, files in the temporary folder. The memory is
read after a collection and with the allocator's free pages given back, so that what is left is in use.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from moee.store.scratch import SCRATCH


def main() -> None:
    repeats, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    os.chdir(folder)
    tempfile.tempdir = str(folder / "tmp")
    os.environ.update(MOEE_CACHE=str(folder / "cache"), TMPDIR=str(folder / "tmp"))
    import torch

    torch.set_num_threads(1)
    from exporter.cli import main as moee
    from tests.reliability.commands import COMMANDS
    from tests.reliability.tiny_vit import write_images, write_weights

    (folder / "tmp").mkdir()
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
    for repeat in range(repeats):
        for name in names or ["extract", "finetune", "export", "verify", "bench", "report", "build"]:
            run(name)
        print(json.dumps({"repeat": repeat, **usage(folder)}), flush=True)
    os._exit(0)


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
