"""Gathers what a bare machine with a GPU lacks, in a folder of at most 48 MiB: `scripts/gpu_pack.sh [OUT]`.

`wheels/`: packages that such a machine may not have (`wheels.txt`). `selftest/`: the program, the cases, and the plugin library
with the kernels of sm_90 and, for what is emulated, those of sm_87. `pack.json` names every file with its size and hash.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from moee.errors import MissingDependency, StepFailed, UserError
from plugins.aot.build import build_kernels
from plugins.library.build import LIBRARY, build_plugin
from plugins.library.selftest import build_selftest
from tests.gpu.cases import write_pack_cases

ROOT = Path(__file__).resolve().parents[2]
WHEELS = Path(__file__).with_name("wheels.txt")
SMS = (87, 90)
MOST = 48 << 20
PLATFORMS = tuple(f"manylinux{kind}_x86_64" for kind in ("_2_28", "_2_27", "_2_17", "2014", "1"))
SCHEMA = "moee.gpu_pack/1"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_pack.sh", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "build" / "gpu", help="the folder; replaced (build/gpu)")
    parser.add_argument("--python", default="3.12", help="of the machine (3.12)")
    args = parser.parse_args(argv)
    work = ROOT / "build" / "gpu-work"
    print("wheels", flush=True)
    wheels = download(work / f"wheels-{args.python}", args.python)
    print(f"kernels for sm {', '.join(map(str, SMS))}", flush=True)
    build_kernels(work / "kernels", SMS, lambda done, total, label: print(f"[{done}/{total}] {label}", flush=True))
    print("plugin and selftest", flush=True)
    library = build_plugin(work / "plugin", work / "kernels")
    program = build_selftest(work / "selftest", work / "plugin" / "generated")
    fresh = args.out.resolve().with_name(args.out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "selftest").mkdir(parents=True)
    shutil.copytree(wheels, fresh / "wheels")
    shutil.copy2(program, fresh / "selftest" / "selftest")
    shutil.copy2(library, fresh / "selftest" / LIBRARY)
    print("cases", flush=True)
    write_pack_cases(fresh / "selftest")
    size = write_list(fresh)
    if size > MOST:
        print(f"{fresh} takes {size / 2**20:.1f} MiB, more than {MOST >> 20}; leave wheels or SMs out", file=sys.stderr)
        return 1
    shutil.rmtree(args.out, ignore_errors=True)
    fresh.rename(args.out.resolve())
    print(f"{args.out}: {size / 2**20:.1f} MiB of at most {MOST >> 20}")
    return 0


def download(folder: Path, python: str) -> Path:
    """The wheels of `wheels.txt` for Linux on x86-64, in `folder`; what lies there already is not fetched again."""
    stamp, wanted = folder / ".complete", WHEELS.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python, "-r", str(WHEELS), "-d", str(folder)]
    subprocess.run([*command, *(word for p in PLATFORMS for word in ("--platform", p))], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return folder


def write_list(folder: Path) -> int:
    """Write `pack.json` and return the bytes of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {}
    for path in files:
        raw = path.read_bytes()
        listed[path.relative_to(folder).as_posix()] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    (folder / "pack.json").write_text(json.dumps({"schema": SCHEMA, "commit": head, "sms": SMS, "files": listed}, indent=1))
    return sum(entry["bytes"] for entry in listed.values())


def said() -> int:
    """`main`, with what went wrong as one sentence. Exit code 3 if this machine lacks something, else 1."""
    try:
        return main()
    except (UserError, MissingDependency, StepFailed, subprocess.CalledProcessError) as error:
        print(f"the pack could not be made: {error}", file=sys.stderr)
        return 3 if isinstance(error, MissingDependency | subprocess.CalledProcessError) else 1


if __name__ == "__main__":
    sys.exit(said())
