"""Build the wheel and the source distribution into a folder: `python scripts/build_dist.py dist [--operator]`.

With `--operator` the wheel brings the operator of ONNX Runtime, compiled for several processors (needs the extra `dist`).
Works from a copy of the tree, so that nothing of an earlier build slips in, and asks no package index.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import build_meta

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plugins.cpu.build import PREBUILT, write_prebuilt  # noqa: E402

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so", "*.plan"
)


def build_dist(out: Path, root: Path = ROOT, *, operator: bool = False) -> tuple[Path, Path]:
    """Paths of the wheel and the source distribution, written to `out`; `operator` says whether the wheel has its libraries."""
    out.mkdir(parents=True, exist_ok=True)
    out, before = out.resolve(), Path.cwd()
    with tempfile.TemporaryDirectory(prefix="moee-dist-") as name:
        tree = Path(name) / "tree"
        shutil.copytree(root, tree, ignore=LEFT_OUT)
        os.chdir(tree)
        try:
            source = build_meta.build_sdist(str(out))
            if operator:
                write_prebuilt(tree / PREBUILT.relative_to(ROOT))
            wheel = build_meta.build_wheel(str(out))
        finally:
            os.chdir(before)
    return out / wheel, out / source


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", default="dist", help="folder of both files")
    parser.add_argument("--operator", action="store_true", help="put the operator of ONNX Runtime into the wheel")
    asked = parser.parse_args()
    for path in build_dist(Path(asked.out), operator=asked.operator):
        print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)")
