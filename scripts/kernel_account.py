"""Print the account of a layer's launches, bytes and products on GPUs as Markdown (modelled).

python scripts/kernel_account.py build/kernels
"""

import sys

from plugins.account import text
from plugins.aot import manifest


def main(arguments: list[str]) -> int:
    """Print the tables for the kernel folder given; exit code 2 for bad input."""
    if len(arguments) != 1:
        print("usage: python scripts/kernel_account.py FOLDER", file=sys.stderr)
        return 2
    try:
        print(text(manifest.load(arguments[0], verify_files=False)), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
