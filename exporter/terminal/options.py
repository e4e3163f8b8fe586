"""Flags from option models: names, types, choices, defaults and help are those of the fields.

argparse parses them, as the rest of the command line; docs/architecture.md says which libraries were tried in its place, and why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moee.config import Options
from moee.expected import plain_type
from moee.schema import shown

SAID = "(default"  # in a description that says the default itself


def flag_of(name: str) -> str:
    """`target_macs` to `--target-macs`."""
    return f"--{name.replace('_', '-')}"


def add_options(
    parser: Any, kind: type[Options], only: Container[str] | None = None, defaults: Mapping[str, Any] | None = None,
    *, hidden: bool = False, said: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """A flag for every field of `kind`, or of those in `only`, that `parser` has no flag for yet. What is not given is None, so
    that it can be told from a default; `defaults` are the command's own. `said`: defaults that the help shows and that others
    put in place. `hidden` flags are taken, and left out of the help."""
    taken = parser._option_string_actions
    for name, field in kind.model_fields.items():
        if (only is None or name in only) and flag_of(name) not in taken:
            default = (defaults or {}).get(name)
            _add(parser, name, field, default, None if hidden else help_of(field, (said or {}).get(name, default)))


def given_options(args: argparse.Namespace, kinds: Iterable[type[Options]]) -> dict[str, Any]:
    """The values that were given for the fields of some models."""
    names = dict.fromkeys(name for kind in kinds for name in kind.model_fields)
    values = {name: getattr(args, name, None) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if value is not None}


def _add(parser: Any, name: str, field: FieldInfo, default: Any, said: str | None) -> None:
    kind = plain_type(field.annotation)
    text = argparse.SUPPRESS if said is None else said.replace("%", "%%")
    if kind is bool:
        parser.add_argument(flag_of(name), action=argparse.BooleanOptionalAction if field.default else "store_true", default=None,
                            help=text)  # fmt: skip
    elif get_origin(kind) is Literal:
        choices = Known(str(choice) for choice in get_args(kind))
        parser.add_argument(flag_of(name), choices=choices, metavar=f"{{{','.join(choices)}}}", help=text)
    elif get_origin(kind) is tuple:
        parser.add_argument(flag_of(name), action="append", metavar="NAME", help=text)
    else:
        parse, metavar = _PARSERS[kind]
        parser.add_argument(flag_of(name), type=parse, metavar=metavar, default=default, help=text)


def help_of(field: FieldInfo, default: Any = None) -> str:
    """A field's description and default."""
    said = field.description or ""
    if SAID in said and default is None:
        return said
    said = said.partition(f" {SAID}")[0]
    value = field.default if default is None else default
    if value is PydanticUndefined:
        return f"{said} (required)"
    if value is None or value == () or value is False:
        return said
    return f"{said} (default: {'yes' if value is True else f'{value:g}' if isinstance(value, float) else value})"


class Known(list[str]):
    """Choices for help and completion; whether one is taken is said by who knows why not."""

    def __contains__(self, item: object) -> bool:
        return True


def _number(kind: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {what}, came {shown(text, limit=40)}") from None

    return parse


_PARSERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (_number(int, "a whole number"), "N"),
    float: (_number(float, "a number"), "X"),
    str: (str, "TEXT"),
}
