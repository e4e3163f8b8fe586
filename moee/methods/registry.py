"""Every method that cuts a model, one line each, and whose options are whose."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

from moee.config import Options, validated
from moee.errors import OptionError, UserError
from moee.methods.base import Method
from moee.methods.clear_moe.method import ClearMethod
from moee.methods.corp.method import CorpMethod
from moee.methods.experts import ExpertsMethod
from moee.methods.heads.method import HeadsMethod
from moee.methods.lowrank.method import LowRankMethod
from moee.methods.moefication.method import MoeficationMethod
from moee.methods.static import StaticMethod
from moee.methods.tokens import TokensMethod
from moee.schema import shown

DEFAULT: Method[Any] = ExpertsMethod()  # what is meant where no method is named
METHODS: list[Method[Any]] = [
    DEFAULT,
    StaticMethod(),
    MoeficationMethod(),
    ClearMethod(),
    CorpMethod(),
    LowRankMethod(),
    HeadsMethod(),
    TokensMethod(),
]


def method_named(name: str) -> Method[Any]:
    """The method of a name, or of an older one. Raises `UserError` that lists the names."""
    for method in METHODS:
        if name in (method.name, *method.also):
            return method
    raise UserError(f"unknown method {shown(name)}; expected one of {', '.join(method.name for method in METHODS)}")


def method_of(options: Options) -> Method[Any]:
    """The method that options are of."""
    return next(method for method in METHODS if method.options is type(options))


def cutting(part: str) -> Iterator[Method[Any]]:
    """The methods that cut a part: the attention, the tokens or the MLPs."""
    return (method for method in METHODS if method.cuts == part)


def presets() -> dict[str, Method[Any]]:
    """Every preset's name and its method."""
    return {name: method for method in METHODS for name in method.presets}


def refuse_dashes(values: Iterable[str], known: Container[str]) -> None:
    """Raise `UserError` for a name that only its dashes keep from being one that is known."""
    for name in values:
        if name not in known and name.replace("-", "_") in known:
            raise OptionError(f"{shown(name)} is written {name.replace('-', '_')}; change it", name)


def options_for(method: Method[Any], values: dict[str, Any]) -> Options:
    """A method's options. Raises `UserError` that names the first value that does not fit; for an option of another method it
    says whose it is."""
    known = method.options.model_fields
    refuse_dashes(values, known)
    for name in values:
        if name not in known:
            owners = [other.name for other in METHODS if name in other.options.model_fields]
            flag = f"--{shown(name, quoted=False).replace('_', '-')}"
            if owners:
                named = " or ".join([", ".join(owners[:-1]), owners[-1]] if owners[1:] else owners)
                here = method.counterparts.get(name)
                advice = f"give --{here.replace('_', '-')} in its place" if here else "leave it out"
                raise OptionError(f"{flag} is for method {named}, and not for {method.name}; {advice}", name)
            raise OptionError(f"{flag} is no option of method {method.name}; expected some of {', '.join(known)}", name)
    return validated(method.options, values)
