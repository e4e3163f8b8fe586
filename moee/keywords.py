"""Functions of the Python interface. Sentences of the command line are as Python speaks them: a flag becomes the keyword of the
function that was called."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import ParamSpec, TypeVar

from moee.cures import offering
from moee.errors import UserError
from moee.surroundings import own_arithmetic

P = ParamSpec("P")
T = TypeVar("T")
# A flag, the field of it that is meant, and the value or what stands for one
FLAG = re.compile(r"--([a-z][a-z0-9-]*)(\.\d+)?( H W, or one number for both| H W| [A-Z]+\b| -?\d[\d.]*\b)?")
SIZES = {" H W": "(H, W)", " H W, or one number for both": "(H, W)"}


def in_python(
    options: Iterable[str] = (), renamed: Mapping[str, str] | None = None
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function one of the Python interface: it computes under its own arithmetic (`moee.surroundings`), and its
    `UserError`s name its keywords where they name flags of the command line. A flag that it has no keyword
    for stays. `options`: keywords that it passes on; `renamed`: flags, with underscores, that are called otherwise here."""

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        parameters = inspect.signature(function).parameters
        known = {name: name for name in (*parameters, *options)} | dict(renamed or {})
        flags = [f"--{name.replace('_', '-')}" for name in known]  # what a refusal may advise
        switches = {name for name, parameter in parameters.items() if parameter.default is False}

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                with own_arithmetic(), offering(flags):
                    return function(*args, **kwargs)
            except UserError as error:
                error.args = (spoken(str(error), known, switches), *error.args[1:])
                raise

        return called

    return decorated


def spoken(text: str, known: Mapping[str, str], switches: Set[str] = frozenset()) -> str:
    """A sentence whose flags are keywords: `known` by the flags' names with underscores; `switches` are true or false."""

    def keyword(found: re.Match[str]) -> str:
        name, value = known.get(found[1].replace("-", "_")), found[3] or ""
        if name is None:
            return found[0]
        if name in switches and not value:
            return f"{name}=True"
        if "=" in name:  # a phrase that says its value
            return name
        return f"{name}={SIZES.get(value, value.strip())}" if value else name

    return FLAG.sub(keyword, text)
