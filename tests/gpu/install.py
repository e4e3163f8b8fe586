"""`python -m tests.gpu.install PACK SITE` unpacks those brought wheels whose package is missing here, without pip or network.

Exit code 3 if a wheel is for another Python or processor.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    pack, site = Path(argv[0]), Path(argv[1])
    wheels = sorted((pack / "wheels").glob("*.whl"))
    if not wheels:
        print(f"{pack / 'wheels'} holds no wheels; run scripts/gpu_pack.sh first", file=sys.stderr)
        return 3
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for wheel in wheels:
        name, number, python, *_ = wheel.name.split("-")
        if (site / f"{name}-{number}.dist-info").is_dir() or _present(name):
            continue
        if here not in python.split(".") and "py3" not in python.split("."):
            wanted = f"scripts/gpu_pack.sh --python {here[2]}.{here[3:]}"
            print(f"{wheel.name} is for another Python than {here}; run {wanted}", file=sys.stderr)
            return 3
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        print(f"{name} {number} from {wheel.name}", file=sys.stderr)
    return 0


def _present(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
