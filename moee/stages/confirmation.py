"""A finished model beside the dense one on images by which nothing was made, chosen or tuned."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moee.data.image_set import UNREADABLE, ImageSet, say_read
from moee.data.sources import load_data, located
from moee.data.validation import Part
from moee.errors import UserError
from moee.measure.accuracy import comparison
from moee.measure.evaluation import Outputs, retention, run
from moee.measure.probe import Probe, classes_told, head_drawn
from moee.progress import track
from moee.stages.session import Session

log = logging.getLogger("moee")
MOST = 2000  # images: they tell accuracies apart by about a point


def fresh_images(session: Session, source: str) -> list[ImageSet]:
    """Images of `source` that the session has not: the held-out ones, or all where the source has no splits, spread over them, at
    most `MOST`. Labels go by the session's classes. Raises `UserError` where none is new."""
    if session.unlike:
        raise UserError(
            f"confirm {source}: which of its images are new cannot be told, since they are prepared by the model's description "
            f"and those that were given otherwise ({'; '.join(session.unlike)}); say with input={{...}} how they are prepared"
        )
    names = session.train.classes
    parts = [_opened(session, source, "val", names)]
    if parts[0].division is not None:
        parts.append(_opened(session, source, "train", names))
    say_read(**dict(zip((f"val of {source}", "train"), parts, strict=False)))
    known = {digest for data in (session.train, session.held_out) for _, digest in _hashed(data, session)}
    found, total = list[ImageSet](), sum(map(len, parts))
    for data in parts:
        new, seen = list[int](), set[str]()
        for index, digest in _hashed(data, session):
            if digest not in known and digest not in seen:
                new.append(index)
                seen.add(digest)
        most = max(1, round(MOST * len(data) / total))
        if len(new) > most:
            new = [new[at * len(new) // most] for at in range(most)]
        if new:
            found.append(Part(data, new))
        known |= seen
    if not found:
        raise UserError(f"none of the {total} images of {source} is new: the model was made or chosen by them; give others")
    kept = sum(map(len, found))
    if kept < total:
        log.info("%d of the %d images of %s confirm the choice: others were seen before, or are too many", kept, total, source)
    return found


def _opened(session: Session, source: str, split: str, names: Sequence[str]) -> ImageSet:
    return load_data(
        source, session.transform, split, classes=names or None, head_classes=getattr(session.dense, "num_classes", 0) or None,
        report=session.report,
    )  # fmt: skip


def _hashed(data: ImageSet, session: Session) -> Iterator[tuple[int, str]]:
    """Each readable image's position and the hash of what a model sees of it."""
    for index in track(range(len(data)), f"images of {data.name} compared", len(data), session.report):
        try:
            yield index, hashlib.sha256(data.load(index).contiguous().numpy().data).hexdigest()
        except UserError:
            raise
        except UNREADABLE:
            continue


def confirmed(session: Session, model: nn.Module, probe: Probe | None, images: Sequence[ImageSet], source: str) -> dict[str, Any]:
    """The retention of `model` on `images`, those of `fresh_images` of `source`, with the name of the `data`, for a manifest."""
    dense, ours = (_run(session, each, images, what) for each, what in ((session.dense, "dense"), (model, "the result")))
    logits = dense.features if probe is None else probe.logits(dense.features)
    told = classes_told(session.dense, probe)
    compared = comparison(
        dense.labels, images[0].num_classes, told, source, logits=logits, drawn=head_drawn(session.spec, probe),
        probe=probe is not None, unknown=images[0].unknown,
    )  # fmt: skip
    return {"data": located(source), "retention": retention(dense, ours, probe, told, compared).to_json()}


def _run(session: Session, model: nn.Module, images: Sequence[ImageSet], what: str) -> Outputs:
    """Outputs on all of the images; no tokens are kept."""
    runs = [run(model, part, session.report, f"{what} on new images", group=session.group) for part in images]
    return Outputs(torch.cat([r.features for r in runs]), None, torch.cat([r.labels for r in runs]), no_tokens="not kept")

