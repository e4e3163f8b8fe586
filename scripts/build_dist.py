"""Build the wheel and the source distribution into a folder: `python scripts/build_dist.py dist`.

Works from a copy of the tree, so that nothing of an earlier build slips in, and asks no package index.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import build_meta

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so", "*.plan"
)


def build_dist(out: Path, root: Path = ROOT) -> tuple[Path, Path]:
    """Paths of the wheel and the source distribution, written to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    out, before = out.resolve(), Path.cwd()
    with tempfile.TemporaryDirectory(prefix="moee-dist-") as name:
        tree = Path(name) / "tree"
        shutil.copytree(root, tree, ignore=LEFT_OUT)
        os.chdir(tree)
        try:
            source = build_meta.build_sdist(str(out))
            wheel = build_meta.build_wheel(str(out))
        finally:
            os.chdir(before)
    return out / wheel, out / source


if __name__ == "__main__":
    for path in build_dist(Path(sys.argv[1] if len(sys.argv) > 1 else "dist")):
        print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)")
