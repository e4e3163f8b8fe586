"""A reader of protobuf's text format, for what the server's configuration uses: scalars, messages, lists."""

from __future__ import annotations

import re
from typing import Any

TOKEN = re.compile(r'\s*(?:#[^\n]*\n\s*)*("(?:[^"\\\n]|\\.)*"|[-+]?[\w.]+|[{}\[\]:,;<>])')


def parse(text: str) -> dict[str, list[Any]]:
    """Field name to the list of its values. Raises `ValueError` for anything that is not text format."""
    tokens, end = [], 0
    while rest := text[end:].strip():
        match = TOKEN.match(text, end)
        if match is None:
            if rest.startswith("#") and "\n" not in rest:
                break
            raise ValueError(f"unexpected {rest[:20]!r}")
        tokens.append(match.group(1))
        end = match.end()
    fields, position = _message(tokens, 0, "")
    if position != len(tokens):
        raise ValueError(f"unexpected {tokens[position]!r}")
    return fields


def _message(tokens: list[str], at: int, closing: str) -> tuple[dict[str, list[Any]], int]:
    fields: dict[str, list[Any]] = {}
    while at < len(tokens) and tokens[at] != closing:
        name = tokens[at]
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"expected a field, came {name!r}")
        at += 1
        if tokens[at] == ":":
            at += 1
        elif tokens[at] not in "{[<":
            raise ValueError(f"{name}: expected a colon or a message, came {tokens[at]!r}")
        if tokens[at] == "[":
            at += 1
            while tokens[at] != "]":
                value, at = _value(tokens, at)
                fields.setdefault(name, []).append(value)
                if tokens[at] == ",":
                    at += 1
                elif tokens[at] != "]":
                    raise ValueError(f"{name}: expected , or ], came {tokens[at]!r}")
            at += 1
        else:
            value, at = _value(tokens, at)
            fields.setdefault(name, []).append(value)
        if at < len(tokens) and tokens[at] in ",;":
            at += 1
    return fields, at


def _value(tokens: list[str], at: int) -> tuple[Any, int]:
    token = tokens[at]
    if token == "{":
        fields, at = _message(tokens, at + 1, "}")
        return fields, at + 1
    if token.startswith('"'):
        octal = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), token[1:-1])
        return octal.encode("latin-1").decode("utf-8"), at + 1
    if token in "[]:,;<>}":
        raise ValueError(f"expected a value, came {token!r}")
    return (float(token) if re.fullmatch(r"[-+]?[\d.]+", token) else token), at + 1
