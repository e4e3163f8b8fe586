"""Runs everything that `moee verify` checks; what can refuse at once goes first."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from exporter.parity import DEFAULT_BATCHES, check_parity
from exporter.parity.refusals import refuse_foreign, refuse_unrouted
from exporter.runners import EngineRunner, check_plugin
from exporter.verification.engine import check_engine
from exporter.verification.graph_accuracy import GraphAccuracy
from exporter.verification.result import VerifyResult
from moee.artifacts.model import MoeeModel
from moee.data.image_set import ImageSet
from moee.data.sources import located
from moee.errors import UserError
from moee.parallel.group import SOLO, Group
from moee.progress import Reporter, silent

log = logging.getLogger("moee")


def verify(
    export_dir: Path | str, moee: MoeeModel, data: ImageSet, *, sizes: Sequence[int] = DEFAULT_BATCHES, provider: str = "cpu",
    threads: int | None = None, rtol: float | None = None, atol: float | None = None, max_drop_pp: float | None = None,
    min_route_agreement: float | None = None, images: int | None = 1000, engine: Path | str | None = None,
    report: Reporter = silent, trust_engine: bool = False,
) -> VerifyResult:  # fmt: skip
    """Verify an export, and an engine folder if given. `images`: labelled images for accuracy (None: all; 0: none).
    `trust_engine`: as in `EngineRunner`.

    Raises `UserError` for folders that do not belong together, `MissingDependency` for an absent provider, plugin or GPU.
    """
    result = verify_ranks(
        SOLO, export_dir, moee, data, sizes=sizes, provider=provider, threads=threads, rtol=rtol, atol=atol,
        max_drop_pp=max_drop_pp, min_route_agreement=min_route_agreement, images=images, engine=engine, report=report,
        trust_engine=trust_engine,
    )  # fmt: skip
    assert result is not None, "one process alone is rank 0"
    return result


def verify_ranks(
    group: Group, export_dir: Path | str, moee: MoeeModel, data: ImageSet, *, sizes: Sequence[int] = DEFAULT_BATCHES,
    provider: str = "cpu", threads: int | None = None, rtol: float | None = None, atol: float | None = None,
    max_drop_pp: float | None = None, min_route_agreement: float | None = None, images: int | None = 1000,
    engine: Path | str | None = None, report: Reporter = silent, trust_engine: bool = False,
) -> VerifyResult | None:  # fmt: skip
    """`verify` on the ranks of a `group`: the images of the accuracy are divided, parity and engine are rank 0's. The result is
    rank 0's, None on the others. Raises `UserError` for a gate that has nothing to check or could not fail."""
    started = time.perf_counter()
    folder = Path(export_dir)
    check = GraphAccuracy(folder, moee, data, images, provider, threads, report, group)
    plugin = None
    with group.agreed():
        refuse_foreign(folder, moee)
        refuse_unrouted(moee, min_route_agreement)
        early = check.early()
        reason = early.reason
        _refuse_unchecked(early.advised, max_drop_pp)
        if early.cure and group.leader:
            log.warning("accuracy will not be compared: %s", early.advised)
        if group.leader:
            plugin = check_plugin(engine, trust_engine) if engine is not None else None  # before anything long
            if engine is not None and plugin is not None and plugin.passed:
                with EngineRunner(engine, trust=trust_engine):
                    pass  # a machine that cannot run it says so now
    dense, failure = None, ""
    if not reason:
        dense = check.outputs("dense")
        reason, failure, idle = check.judge(dense, max_drop_pp)
        with group.agreed():  # before minutes of parity
            if not failure:
                _refuse_unchecked(reason, max_drop_pp)
            if idle and not failure:
                raise UserError(f"--max-drop {max_drop_pp:g} limits nothing: {idle}")
    parity = None
    with group.agreed():
        if group.leader:
            parity = check_parity(
                folder, moee, data, threads, report, sizes=sizes, provider=provider, rtol=rtol, atol=atol,
                min_route_agreement=min_route_agreement, group=group,
            )  # fmt: skip
    accuracy = None if dense is None or reason else check.compare(dense, check.outputs("moee"), max_drop_pp)
    built, result = None, None
    with group.agreed():
        if parity is not None:
            if engine is not None and plugin is not None:
                built = check_engine(
                    folder, Path(engine), plugin, moee, data, precision=parity.precision, rtol=rtol, atol=atol, report=report,
                    trust=trust_engine,
                )  # fmt: skip
            read = {"val": data.facts(), "notes": list(data.notes)}
            seconds, source = time.perf_counter() - started, located(data.name)
            result = VerifyResult(folder.name, parity, accuracy, reason, built, seconds, read, failure, source)
    return result


def _refuse_unchecked(reason: str, max_drop_pp: float | None) -> None:
    """A gate that has nothing to check is bad input, not a pass."""
    if reason and max_drop_pp is not None:
        raise UserError(f"--max-drop cannot be checked: {reason}; leave --max-drop out to go on without it")
