"""Sections that show images: classes, images whose class changed, and the patches of each expert, from `examples.json`."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from exporter.markup import Html, table, tag
from exporter.markup.values import dig, fixed, percent, real, word
from exporter.report.sections import not_there
from exporter.report.sources import EXAMPLES, Sources
from moee.schema import data_title

MAKES = "moee plots MODEL --out plots"
MOST_CLASSES, MOST_CHANGED, MOST_LAYERS, MOST_EXPERTS = 2000, 100, 200, 64  # a page shows no more
PICTURE_BYTES = 700 << 10  # of all pictures, in base64
MOST_SIDE = 1 << 12
JPEG = b"\xff\xd8\xff"


class Pictures:
    """Pictures of one `examples.json`, which anyone may have written: JPEG alone, and with those `used` elsewhere no more than
    `PICTURE_BYTES`."""

    def __init__(self, used: int = 0) -> None:
        self.used = used

    def image(self, entry: Any, alt: str) -> Html:
        """The picture of an entry as an element, or a sentence that there is none."""
        data = dig(entry, "picture")
        width, height = (real(dig(entry, side)) for side in ("width", "height"))
        if not isinstance(data, str) or not _is_jpeg(data) or self.used + len(data) > PICTURE_BYTES:
            return tag("span", "no picture", class_="note")
        self.used += len(data)
        sizes = {k: int(v) for k, v in (("width", width), ("height", height)) if v is not None and 0 < v <= MOST_SIDE}
        return tag("img", src=f"data:image/jpeg;base64,{data}", alt=alt, **sizes)


def _is_jpeg(data: str) -> bool:
    try:
        return base64.b64decode(data, validate=True).startswith(JPEG)
    except (binascii.Error, ValueError):
        return False


def _absent(sources: Sources) -> list[Html]:
    if sources.no_examples:
        return [tag("p", sources.no_examples, class_="missing")]
    return [not_there("Examples (examples.json) were", MAKES)]


def classes(sources: Sources) -> tuple[str | None, list[Html]]:
    """Accuracy of every class before and after, and the images whose class changed."""
    body = sources.body(EXAMPLES)
    if body is None:
        return None, _absent(sources)
    said = f"On {fixed(body.get('images'), 0)} of {fixed(body.get('of_images'), 0)} held-out images of "
    parts = [tag("p", said + f"{data_title(word(body.get('data')))}, spread evenly.")]
    rows: list[list[object]] = []
    keys: list[list[float | str]] = []
    for row in _dicts(dig(body, "classes", "rows"))[:MOST_CLASSES]:
        images, dense, moee = (real(row.get(key)) for key in ("images", "dense", "moee"))
        if not images or dense is None or moee is None:
            continue
        change = (moee - dense) / images
        name = word(row.get("name"))
        points = f"{100 * change:+.1f}".replace("-", "−")
        rows.append([name, fixed(images, 0), _share(dense, images), _share(moee, images), points])
        keys.append([name, images, dense / images, moee / images, change])
    if rows:
        caption = "Accuracy of each class; what lost most stands first"
        parts.append(table(["class", "images", "dense", "MoEE", "points"], rows, caption, id_="classes-table", sort_keys=keys))
    else:
        why = dig(body, "classes", "why")
        parts.append(tag("p", f"Accuracy of classes is not compared: {why or 'no class has an image'}.", class_="missing"))
    return None, [*parts, *_changed(dig(body, "changed"))]


def _share(right: float, images: float) -> str:
    return f"{percent(right / images, 1)} ({right:.0f} of {images:.0f})"


def _changed(changed: Any) -> list[Html]:
    heading = tag("h3", "Images whose class changed")
    if why := dig(changed, "why"):
        return [heading, tag("p", f"Not shown: {why}.", class_="missing")]
    lost, gained, other = (fixed(dig(changed, key), 0) for key in ("lost", "gained", "other"))
    shown = _shown(changed)
    text = f"{lost} lost the right class, {gained} gained it, {other} changed otherwise. {len(shown)} are shown, in this order."
    pictures, figures = Pictures(), []
    for entry in shown:
        label, dense, moee = (word(dig(entry, key)) for key in ("label", "dense", "moee"))
        said = [tag("span", f"label {label}"), tag("span", f"dense {dense}"), tag("span", f"MoEE {moee}")]
        image = pictures.image(entry, f"image of label {label}: dense says {dense}, MoEE {moee}")
        figures.append(tag("figure", image, tag("figcaption", *said)))
    return [heading, tag("p", text), *([tag("div", *figures, class_="thumbs")] if figures else [])]


def _shown(changed: Any) -> list[dict[str, Any]]:
    return _dicts(dig(changed, "shown"))[:MOST_CHANGED]


def experts(sources: Sources) -> tuple[str | None, list[Html]]:
    """A grid a routed layer: the patches whose tokens lie nearest each expert's router row."""
    body = sources.body(EXAMPLES)
    if body is None:
        return None, [] if sources.no_examples else _absent(sources)  # said under the classes
    text = "Each box is one expert, the busiest first: the image patches whose tokens lie nearest its router row, of those that "
    text += "it gets, by cosine, one an image. The share is that of all patches; class and register tokens have none."
    parts: list[Html] = [tag("p", text)]
    pictures = Pictures(sum(len(str(entry.get("picture", ""))) for entry in _shown(dig(body, "changed"))))
    for index, layer in enumerate(_dicts(dig(body, "experts", "layers"))[:MOST_LAYERS]):
        name, rows = word(layer.get("name")), _dicts(layer.get("experts"))[:MOST_EXPERTS]
        drawn = []
        for row in rows:
            expert, share = fixed(row.get("expert"), 0), _taken(row.get("share"))
            image = pictures.image(row, f"{name}, expert {expert}: patches nearest its router row")
            none = row.get("patches") == 0
            said = f"expert {expert}: it gets no patch" if none else f"expert {expert}: {share}"
            drawn.append(tag("figure", tag("figcaption", said), "" if none else image))
        of = real(layer.get("of"))
        top = max((s for row in rows if (s := real(row.get("share"))) is not None), default=None)
        said = f"{name}: {fixed(of, 0)} experts, the busiest takes {percent(top, 0)} of the patches"
        said += f"; {len(rows)} are shown" if of is not None and of > len(rows) else ""
        parts.append(tag("details", tag("summary", said), tag("div", *drawn, class_="strips"), open=index == 0))
    left_out = dig(body, "experts", "left_out")
    if isinstance(left_out, dict) and left_out:
        items = [tag("li", f"{name}: {why}") for name, why in list(left_out.items())[:MOST_LAYERS]]
        parts += [tag("p", "Layers without patches:"), tag("ul", *items)]
    return None, parts


def _taken(share: Any) -> str:
    """A share of the patches; one that rounds to nothing is no nothing."""
    number = real(share)
    return "below 0.1%" if number is not None and 0 < number < 0.001 else percent(share, 1)


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []
