"""The acceptance where there is no GPU: `scripts/gpu_rehearse.sh [OUT]`.

Makes a virtual environment of Python 3.12 with the versions of `machine.txt` while it packs, cuts the network off and runs every
part as far as it goes without a device: programs against the double of the driver, models on the CPU with the kernels in Triton's
interpreter, GPU tests up to their collection. What a device would add is printed at the end. Exit code 1 if a part fails, 3 if
the environment cannot be made.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.plugins.build_doubles import build_device, build_libraries

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu-rehearsal"
MACHINE, WHEELS = (Path(__file__).with_name(name) for name in ("machine.txt", "wheels.txt"))
# a network namespace of its own, with nothing in it but the loopback
OFFLINE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_rehearse.sh", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=WORK / "results", help="results (build/gpu-rehearsal/results)")
    parser.add_argument("--python", help="the interpreter of the environment (python3.12, or one that pyenv has)")
    args = parser.parse_args(argv)
    began = time.monotonic()

    def ready(what: str) -> None:
        print(f"{what}: ready after {time.monotonic() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(1) as beside:  # one waits for the network and the disk, the other compiles
        made = beside.submit(environment, args.python)
        made.add_done_callback(lambda done: None if done.exception() else ready("environment"))
        if code := subprocess.run(["sh", str(ROOT / "scripts" / "gpu_pack.sh")]).returncode:
            return code
        ready("pack")
        doubles = build_device(WORK / "doubles", ROOT / "build" / "gpu-work" / "plugin" / "generated").parent
        build_libraries(doubles)
        ready("doubles of the driver and its libraries")
        try:
            python = made.result()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no environment like the machine's could be made: {error}", file=sys.stderr)
            return 3
    offline = OFFLINE if subprocess.run([*OFFLINE, "true"], capture_output=True).returncode == 0 else ()
    print("the network is cut off" if offline else "the network could not be cut off here", flush=True)
    command = ["sh", str(ROOT / "scripts" / "gpu_acceptance.sh"), str(args.out.resolve()), "--rehearse", "--driver", str(doubles)]
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "LANG")}
    done = subprocess.run([*offline, *command], env={**kept, "PYTHON": str(python), "OMP_NUM_THREADS": "1"})
    print(f"rehearsed in {time.monotonic() - began:.0f} s; no GPU, so nothing of it is a measurement", flush=True)
    return done.returncode


def interpreter() -> str:
    """Python 3.12 on the search path, where pyenv may put one that only says which versions there are, or one of pyenv."""
    found = ["python3.12", *map(str, sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12")))]
    for name in found:
        with contextlib.suppress(OSError):
            if subprocess.run([name, "--version"], capture_output=True).returncode == 0:
                return name
    raise OSError("there is no python3.12; name one with --python")


def environment(name: str | None = None) -> Path:
    """The environment's Python, made from the interpreter of that `name`; made again when the lists change."""
    folder, wanted = WORK / "venv", hashlib.sha256(MACHINE.read_bytes() + WHEELS.read_bytes()).hexdigest()
    stamp = folder / ".machine"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        print("environment: installing", flush=True)
        subprocess.run([name or interpreter(), "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check"]
        # most of the modules are never imported: compiling them all takes longer than unpacking them
        subprocess.run([*pip, "install", "--no-compile", "-r", str(MACHINE)], check=True)
        lacking = [line.partition("==")[0] for line in WHEELS.read_text().splitlines() if not line.startswith("#")]
        subprocess.run([*pip, "uninstall", "-y", *lacking], check=True)  # other packages brought some of them
        stamp.write_text(wanted)
    return folder / "bin" / "python"


if __name__ == "__main__":
    sys.exit(main())
