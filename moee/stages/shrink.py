"""The command `shrink` as a function: load, make the experts fewer, measure against the dense model, save."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel, recorded_data
from moee.measure.metrics import tokens_per_image
from moee.parallel.devices import title_of
from moee.parallel.group import SOLO, Group
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.progress import Reporter, silent
from moee.shrinking.options import ShrinkConfig
from moee.shrinking.shrink import ShrunkLayer, mixtures_of, shrink
from moee.space.estimate import LayerShape, ModelShape
from moee.stages.results import kept, measured, save
from moee.stages.session import Session
from moee.store.result_kinds import MODEL


def run_shrink(
    path: Path | str, config: ShrinkConfig, out: Path | str, *, source: str | None = None, force: bool = False,
    report: Reporter = silent, group: Group = SOLO, weights: Path | str | None = None, model: str | None = None,
    memory: int | None = None,
) -> MoeeModel:  # fmt: skip
    """`moee shrink`: make the experts of the artifact at `path` fewer and save the result at `out`.

    `source`: any images; without it the artifact's own. They become its data, as with `run_finetune`, and their classes are known
    by the artifact's names. Raises `UserError` for what cannot be shrunk, before any work. Where measuring fails or is
    interrupted, the artifact is written without measurements, as `run_extract` does.
    """
    inputs = source_paths(path, source, weights)
    OutputFolder(out, MODEL, force, inputs).check()
    moee = checkpoint.load(path, model)
    if weights is not None:
        moee.take_weights(weights)
    mixtures_of(moee.model, config)
    recorded = source or recorded_data(moee.data)
    session = Session(
        moee.dense_spec, recorded, seed=moee.seed, report=report, group=group, classes=moee.classes, memory=memory
    )
    shrink_with(moee, session, config, out, force=force, inputs=inputs)
    return moee


def shrink_with(
    moee: MoeeModel, session: Session, config: ShrinkConfig, out: Path | str | None, *, force: bool = False,
    inputs: tuple[Path, ...] = (),
) -> None:  # fmt: skip
    """Make the experts of `moee` fewer, in place, on the session's images, and save it at `out` unless that is None."""
    moee.check_images(session.source, session.train, session.held_out, session.report)
    session.warn_early(moee.probe)
    started, group, report = time.perf_counter(), session.group, session.report
    _keep_within_memory(moee, session, config)
    layers = shrink(moee.model, config, session.train, report=report, group=group, limits=session.space.limits)
    facts: dict[str, Any] = {
        "data": session.source, "division": session.data_facts()["division"], "seconds": time.perf_counter() - started,
        "device": title_of(group.device), "config": config.model_dump(), "layers": [asdict(layer) for layer in layers],
    }  # fmt: skip
    stages = moee.info["stages"]
    facts["tunings"] = 1 + len(stages["tuned"].get("before", [])) if "tuned" in stages else 0  # that came first
    if "shrunk" in stages:  # of a model that was shrunk before
        former = stages.pop("shrunk")
        first = {key: former[key] for key in ("data", "division", "config", "tunings") if key in former}
        facts["before"] = [*former.get("before", []), first]
    stages["shrunk"] = facts
    moee.info["data_read"], moee.data = session.data_facts(), session.source
    moee.info["layers"] = [_updated(item, {layer.name: layer for layer in layers}, moee) for item in moee.info["layers"]]
    with kept(moee, "shrunk", out, force, group, inputs=inputs):
        stages["shrunk"] = {**measured(session, moee.model, moee.probe, "shrunk on held-out images"), **facts}
        moee.info["data_read"] = session.data_facts()
    save(moee, out, force, group, inputs)


def _keep_within_memory(moee: MoeeModel, session: Session, config: ShrinkConfig) -> None:
    """Cut the work into pieces that the memory holds. Raises `UserError` where memory or disk do not suffice."""
    mixtures = mixtures_of(moee.model, config)
    tokens = tokens_per_image(session.dense, [mixture.name for mixture in mixtures], session.transform.shape)  # or fewer, merged
    layers = tuple(LayerShape(each.dim, each.layer.union, tokens[each.name]) for each in mixtures)
    weights = sum(p.numel() for model in (moee.model, session.dense) for p in model.parameters())
    shape = ModelShape(weights, math.prod(session.transform.shape), layers)
    experts = max(mixture.layer.num_experts for mixture in mixtures)
    session.space.shrunk(shape, config, len(session.train), len(session.held_out), experts)


def _updated(item: dict[str, Any], shrunk: dict[str, ShrunkLayer], moee: MoeeModel) -> dict[str, Any]:
    """What the manifest says of a layer, with its experts as they are now."""
    if (done := shrunk.get(item.get("name", ""))) is None:
        return item
    layer: Any = moee.model.get_submodule(done.name)
    share = [part / max(1, sum(layer.load)) for part in layer.load]
    mean = sum(width * part for width, part in zip(layer.widths, share, strict=True))
    refitted = {} if done.refit is None else {"refit": asdict(done.refit)}
    return {
        **item, "experts": layer.num_experts, "union": layer.union, "widths": layer.widths, "share": share, "tokens": done.tokens,
        "mean_width": mean, **refitted,
    }  # fmt: skip
