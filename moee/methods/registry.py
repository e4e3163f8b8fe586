"""Every method that cuts a model, one line each, and whose options are whose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from moee.config import ExtractConfig, MethodOptions
from moee.layers.report import LayerReport
from moee.methods.base import Context, Method, Shares
from moee.methods.clear_moe.method import ClearMethod
from moee.methods.convert import extract
from moee.schema import checked


class ExpertsMethod(Method[ExtractConfig]):
    """Experts of neurons: the paper's, and static pruning, which is one expert."""

    name, options = "moee", ExtractConfig
    shares: ClassVar[Shares] = "groups"

    def convert(self, model: nn.Module, options: ExtractConfig, context: Context) -> Sequence[LayerReport]:
        return extract(
            model, context.data, options, context.report, jobs=context.jobs, sampled=context.sampled, group=context.group
        )


class MoeficationMethod(ExpertsMethod):
    """Disjoint experts of equal size, several a token."""

    name = "moefication"
    shares = "tokens"


FIRST = ExpertsMethod()
METHODS: dict[str, Method[Any]] = {method.name: method for method in (FIRST, MoeficationMethod(), ClearMethod())}


def method_of(options: MethodOptions) -> Method[Any]:
    """The method that options are of."""
    return METHODS[options.method]


def options_of(values: Any) -> type[MethodOptions]:
    """The model of a method's options, for their `values` as a file has them; what names no method is of the first."""
    name = values.get("method") if isinstance(values, dict) else None
    return (METHODS.get(name, FIRST) if isinstance(name, str) else FIRST).options


def read_options(values: Any, path: Path) -> Any:
    """A method's options as the file `path` has them, checked. Raises `UserError` for wrong ones."""
    return checked(options_of(values), values, path)
