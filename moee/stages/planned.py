"""What a plan says of the images that its winner was chosen by, for the model that is made of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moee.data.sources import same_data
from moee.errors import UserError
from moee.places.resume import ANSWERS, alike, fingerprints
from moee.schema import shown
from moee.stages.identity import model_identity
from moee.stages.session import Session

log = logging.getLogger("moee")


@dataclass(frozen=True)
class Planned:
    """`data`: the source of a plan's images, empty where it does not say; `images`: their fingerprints by split, none in plans of
    earlier versions; `candidates`: models that were made and measured; `answers`: what a model of someone's own code gave, if it
    was made of one."""

    data: str
    images: Mapping[str, str] = field(default_factory=dict)
    candidates: int = 0
    answers: Any = None

    def check(self, session: Session) -> None:
        """Raise `UserError` where the session's model, of someone's own code, gives other outputs than the plan's did."""
        if not alike(self.answers, model_identity(session).get(ANSWERS)):
            raise UserError(
                f"the plan was made for {session.spec.name} when it gave other outputs: its code, or an attribute that it reads, "
                "has changed since; plan again"
            )

    def among(self, session: Session) -> int:
        """From how many models the plan chose by the images that the session holds out; 0 where these are others, or nobody
        knows. Warns where another method may win, since the plan was made on other images. Reads all of them."""
        made = shown(self.data, quoted=False) if self.data else "data that it does not name"
        if not self.images:
            if not same_data(session.source, self.data):
                log.warning("the plan was made on %s, and on %s another method may win", made, session.source)
            return 0
        ours = dict(zip(("train", "val"), fingerprints(session.train, session.held_out, session.report), strict=True))
        if ours != dict(self.images):
            same = same_data(session.source, self.data)
            where = "which have changed since" if same else f"and not on those of {session.source}"
            log.warning("the plan was made on the images of %s, %s: another method may win", made, where)
        return self.candidates if ours["val"] == self.images.get("val") else 0
