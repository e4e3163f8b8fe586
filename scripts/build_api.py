"""Write the API reference as HTML, from the docstrings: `python scripts/build_api.py build/site/api`. A warning is an error."""

from __future__ import annotations

import sys
import typing
import warnings
from pathlib import Path
from types import ModuleType

PACKAGES = ("moee", "exporter", "plugins", "!plugins.kernels", "!exporter.engines.worker")


def resolve_fields(module: ModuleType) -> None:
    """Make types of the texts that annotate the fields of named tuples and dataclasses. pdoc looks them up in the wrong place: a
    named tuple's in a namespace of its own, those of a dataclass's parents in the module of the child."""
    for kind in vars(module).values():
        if not isinstance(kind, type) or kind.__module__ != module.__name__:
            continue
        named = issubclass(kind, tuple) and hasattr(kind, "_fields")
        maker = kind.__new__ if named else kind.__init__ if "__dataclass_fields__" in vars(kind) else None
        if given := getattr(maker, "__annotations__", None):
            types = typing.get_type_hints(kind)
            maker.__annotations__ = {name: types[name] for name in given if name in types}  # not pydantic's own


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
        resolve_fields(sys.modules[name])
    warnings.simplefilter("error")
    pdoc.render.configure(docformat="markdown", show_source=False)
    pdoc.pdoc(*PACKAGES, output_directory=out)
    print(f"API reference of {len(pdoc.extract.walk_specs(PACKAGES))} modules written to {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/site/api")))
