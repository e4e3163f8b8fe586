"""What a job says before its work: what will be done, and how long that may take."""

from __future__ import annotations

from collections.abc import Callable

from exporter.compression.clock import Clock, duration
from exporter.compression.request import Request, described
from exporter.terminal.ui import percent
from moee.planning.budget import Budget
from moee.stages.session import Session, is_classifier


def announce(session: Session, request: Request, clock: Clock, budget: Budget, say: Callable[[str], None]) -> None:
    """Say it, by the dense model's own speed, which the `clock` is told."""
    images = len(session.reference.features)
    clock.image_s = session.dense_seconds / images
    clock.held_out, clock.training, clock.batch = images, len(session.train), request.batch
    say(
        f"{session.spec.name}: {len(session.train)} training and {images} held-out images; budget: {described(budget)}; "
        f"device: {request.device}, batch {request.batch}"
    )
    if is_classifier(session.dense) and (compared := session.comparison(None)) and compared.dense is not None:
        say(f"accuracy of the dense model: {percent(compared.dense.value)} of {compared.labelled} labelled held-out images")
    if few := allowance(budget, sum(label >= 0 for label in session.held_out.labels)):
        say(few)
    if request.time_s is None:
        say("no time limit: plan, extract, tune, export, verify, bench, bundle, report")
        return
    trials, rest = max(0.0, clock.trials_end - clock.spent), clock.finish
    planned = f": trials for about {duration(trials)}" if trials >= 1 else " is too short: one trial all the same"
    say(
        f"time {duration(request.time_s)}{planned}, then {'tuning, then ' * clock.tunes}"
        f"{duration(rest)} for export, verification, timing and bundle (the dense model takes "
        f"{1e3 * clock.image_s:.0f} ms an image here)"
    )


def allowance(budget: Budget, labelled: int) -> str:
    """What a drop of accuracy is in images, where single ones matter: of 80 images one is 1.25 points. Else empty."""
    if budget.max_drop is None or not labelled or 100 / labelled < budget.max_drop / 5:
        return ""
    most = int(budget.max_drop * labelled / 100 + 1e-9)
    lost = f"{most} may be lost" if most else "none may be lost"
    share = 100 / labelled
    one = f"one of the {labelled} labelled held-out images is {share:.3g} {'point' if share == 1 else 'points'} of accuracy"
    return f"{one}, so {lost}; more images tell more"
