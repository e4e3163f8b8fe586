"""What a field takes, in words: pydantic's own sentences name neither both bounds nor an example."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

SHARE = "such as 0.9"
NUMBERS = {
    "greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "int_from_float", "int_parsing",
    "int_parsing_size", "int_type", "float_parsing", "float_type",
}  # fmt: skip


def plain_type(annotation: Any) -> Any:
    """A field's type without None and without bounds."""
    if get_origin(annotation) is Annotated:
        return plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return plain_type(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation


def limits(field: FieldInfo) -> dict[str, float]:
    """The bounds of a number's field, by pydantic's names: ge, gt, le, lt."""
    found: dict[str, float] = {}
    for part in [*field.metadata, *_inner(field.annotation)]:
        found |= {name: value for name in ("ge", "gt", "le", "lt") if (value := getattr(part, name, None)) is not None}
    return found


def _inner(annotation: Any) -> list[Any]:
    """What stands beside the types in an annotation, however deep."""
    if get_origin(annotation) is Annotated:
        first, *rest = get_args(annotation)
        marks = [mark for part in rest for mark in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return [*_inner(first), *marks]
    if get_origin(annotation) in (Union, types.UnionType, tuple, list):
        return [mark for part in get_args(annotation) for mark in _inner(part)]
    return []


def expected(field: FieldInfo) -> str:
    """What a field of numbers or of named choices takes; "" for another one."""
    kind = plain_type(field.annotation)
    if get_origin(kind) in (tuple, list):
        kind = plain_type(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return f"expected one of {', '.join(map(str, get_args(kind)))}"
    if kind not in (int, float):
        return ""
    bounds = limits(field)
    if kind is int:
        low = bounds.get("ge", bounds["gt"] + 1 if "gt" in bounds else None)
        high = bounds.get("le", bounds["lt"] - 1 if "lt" in bounds else None)
        return "expected a whole number" + ("" if low is None or high is None else f" from {low} to {high}")
    top = bounds.get("le", bounds.get("lt"))
    what = "a share" if top == 1 else "a number"
    words = [f"above {bounds['gt']:g}" if "gt" in bounds else f"from {bounds['ge']:g}" if "ge" in bounds else "",
             f"below {bounds['lt']:g}" if "lt" in bounds else f"to {bounds['le']:g}" if "le" in bounds else ""]  # fmt: skip
    if "gt" in bounds and "le" in bounds:
        words[1] = f"and at most {bounds['le']:g}"
    elif "lt" in bounds and words[0]:
        words[1] = f"and {words[1]}"
    example = f", {SHARE}" if top == 1 else ""
    return " ".join(["expected", what, *filter(None, words)]) + example
