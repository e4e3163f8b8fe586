"""The batch profile of an engine, from trtexec's way of writing shapes."""

from __future__ import annotations

import re
from pathlib import Path

from exporter.manifests import input_shape, read_export
from moee.config import MOST_BATCH
from moee.errors import UserError
from moee.models.model import Shape
from moee.schema import shown

DEFAULT_BATCH = (1, 8, 32)


def batch_profile(export_dir: Path, low: str | None, opt: str | None, high: str | None) -> tuple[int, int, int]:
    """(min, opt, max) batch from `input:1x3x224x224`, `1x3x224x224` or just `1`; defaults 1, 8, 32.

    Raises `UserError` for a shape that the exported graph does not take.
    """
    given = read_export(export_dir, verify=False)["input"]
    batches = [_batch(text, given["name"], input_shape(given)) for text in (low, opt, high)]
    stated = [b for b in batches if b]
    first = batches[0] or min([DEFAULT_BATCH[0], *stated])
    last = batches[2] or max([DEFAULT_BATCH[2], *stated])
    middle = batches[1] or min(max(DEFAULT_BATCH[1], first), last)
    if not first <= middle <= last:
        raise UserError(f"batch profile {first}/{middle}/{last}: expected min <= opt <= max")
    return first, middle, last


def _batch(text: str | None, name: str, shape: Shape) -> int | None:
    if text is None:
        return None
    wanted = f"{name}:Bx{'x'.join(map(str, shape))}"
    match = re.fullmatch(rf"(?:'?{re.escape(name)}'?:)?(\d{{1,9}})(?:x(\d+)x(\d+)x(\d+))?", text.strip())
    if match is None or not 1 <= int(match[1]) <= MOST_BATCH:
        raise UserError(f"shape {shown(text)}: expected {wanted} or a batch size B, from 1 to {MOST_BATCH}")
    rest = tuple(int(v) for v in match.groups()[1:] if v)
    if rest and rest != shape:
        raise UserError(f"shape {text!r} is outside the graph's range: it takes {wanted}, only B may vary")
    return int(match[1])
