"""Mixture of Extracted Experts: find, in a trained Vision Transformer, the experts its activations reveal.

`load_model`, `extract`, `finetune`, `shrink`, `evaluate`, `save` and `load` are the Python interface (`moee.api`).
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from moee.version import VERSION

__version__ = VERSION
warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm, which timm's downloads import; it draws nothing here

INTERFACE = ("load_model", "extract", "finetune", "shrink", "evaluate", "save", "load")
MODULES = ("errors", "progress")  # that go with it: `moee.errors.UserError`, `moee.progress.silent`

if TYPE_CHECKING:
    from moee import errors as errors
    from moee import progress as progress
    from moee.api import evaluate as evaluate
    from moee.api import extract as extract
    from moee.api import finetune as finetune
    from moee.api import load as load
    from moee.api import load_model as load_model
    from moee.api import save as save
    from moee.api import shrink as shrink


def __getattr__(name: str) -> Any:
    """The interface is imported when it is used: importing torch takes seconds."""
    if name in MODULES:
        return importlib.import_module(f"moee.{name}")
    if name not in INTERFACE:
        raise AttributeError(f"module 'moee' has no attribute {name!r}")
    from moee import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *INTERFACE, *MODULES])
