"""HTML and SVG as strings, escaped by construction: text that is not `Html` already cannot become markup.

Names of layers, models, files and data come from manifests that anyone may have written.
"""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Finished markup. Everything else that `tag` is given gets escaped."""


VOID = {"meta", "img", "br", "hr"}


def text(value: object) -> Html:
    """`value` as markup: escaped, unless it is markup."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[object], separator: str = "") -> Html:
    return Html(separator.join(text(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. `class_` gives `class`, other underscores become hyphens; None leaves an attribute out, True bares it."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
        words.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def raw_text_element(name: str, body: str) -> Html:
    """`<style>` or `<script>` with our own text. Raises `ValueError` if that text would close the element."""
    if f"</{name}" in body.lower():
        raise ValueError(f"the body of <{name}> must not contain </{name}")
    return Html(f"<{name}>{body}</{name}>")


def table(
    head: list[str],
    rows: list[list[object]],
    caption: str,
    *,
    id_: str | None = None,
    sort_keys: list[list[float | str]] | None = None,
) -> Html:
    """A data table; the first column heads its row, the others are right-aligned.

    With `sort_keys`, one list a row, the column heads are buttons that sort the rows by those keys.
    """
    cells = [_head(label, sort_keys is not None) for label in head]
    body = []
    for index, row in enumerate(rows):
        keys: list[float | str | None] = list(sort_keys[index]) if sort_keys else [None] * len(row)
        first, *rest = zip(row, keys, strict=True)
        data = [tag("td", value, data_sort=key) for value, key in rest]
        body.append(tag("tr", tag("th", first[0], scope="row", data_sort=first[1]), *data))
    inner = tag(
        "table", tag("caption", caption), tag("thead", tag("tr", *cells)), tag("tbody", *body),
        id=id_, class_="sortable" if sort_keys is not None else None,
    )  # fmt: skip
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _head(label: str, sortable: bool) -> Html:
    if not sortable:
        return tag("th", label, scope="col")
    return tag("th", tag("button", label, type="button"), scope="col", aria_sort="none")
