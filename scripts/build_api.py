"""Write the API reference as HTML, from the docstrings: `python scripts/build_api.py build/site/api`. A warning is an error."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

PACKAGES = ("moee", "exporter", "plugins", "!plugins.kernels", "!exporter.engines.worker")


def main(out: Path) -> int:
    try:
        import pdoc
        import pdoc.doc
    except ImportError:
        print("pdoc is not installed; run pip install 'moee[docs]'", file=sys.stderr)
        return 3
    warnings.simplefilter("ignore")  # what torch and onnxscript say while they are imported
    for name in pdoc.extract.walk_specs(PACKAGES):
        __import__(name)
    warnings.simplefilter("error")
    pdoc.render.configure(docformat="markdown", show_source=False)
    pdoc.pdoc(*PACKAGES, output_directory=out)
    print(f"API reference of {len(pdoc.extract.walk_specs(PACKAGES))} modules written to {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/site/api")))
