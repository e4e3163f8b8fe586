"""The command `finetune` as a function: load, distil, measure against the dense model, save."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel, recorded_data
from moee.config import FinetuneConfig
from moee.data.sources import same_data
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.measure.metrics import tokens_per_image
from moee.mlps.find import find_ffns
from moee.parallel.devices import title_of
from moee.parallel.group import SOLO, Group
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder, resume_folder
from moee.places.placement import check_all
from moee.places.resume import alone_on
from moee.progress import Reporter, silent
from moee.stages.results import kept, measured, save
from moee.stages.session import Session
from moee.stages.space import model_shape
from moee.store.result_kinds import FINETUNE_STATE, MODEL
from moee.train.finetuning import finetune


def run_finetune(
    path: Path | str, config: FinetuneConfig, out: Path | str, *, source: str | None = None, force: bool = False,
    report: Reporter = silent, session: Session | None = None, group: Group = SOLO, workers: int = 0,
    weights: Path | str | None = None, model: str | None = None, memory: int | None = None,
) -> MoeeModel:  # fmt: skip
    """`moee finetune`: distil the dense model into the artifact at `path` and save the result at `out`.

    An interrupted run leaves its state in `<out>.resume`; the same call goes on from there. In a `group` every step's batch is
    divided over the ranks; rank 0 keeps the state, measures and writes. Where measuring fails or is interrupted, the artifact is
    written without measurements, as `run_extract` does; the state stays, so that the same call with `force` only measures again.

    `source`, or the artifact's data without it, becomes the artifact's data: what later commands take by default. What it was
    extracted on stays with that stage. `model`: as in `checkpoint.load`.
    """
    group = group if session is None else session.group
    inputs = source_paths(path, source, weights)
    state = resume_folder(out, FINETUNE_STATE, inputs)
    with group.agreed():
        if group.leader:
            check_all([OutputFolder(out, MODEL, force, inputs), state])
    with ExitStack() as held:
        with group.agreed():
            held.enter_context(alone_on(state.place, group.leader))
            moee = checkpoint.load(path, model)
            if weights is not None:
                moee.take_weights(weights)
            spec = moee.dense_spec if session is None else session.spec
            if source is not None and session is None and moee.probe is not None and not same_data(source, moee.data):
                raise UserError(
                    f"the artifact's probe was fitted on {moee.data}, so it cannot be tuned on {source}; extract on {source}"
                )
            recorded = source or (recorded_data(moee.data) if session is None else moee.data)
        seed = moee.seed
        session = session or Session(
            spec, recorded, seed=seed, report=report, group=group, workers=workers, classes=moee.classes, memory=memory
        )
        session.warn_early(moee.probe)
        tune(moee, session, config, state.place, out, force=force, inputs=inputs)
        if group.leader:
            state.remove()
    return moee


def tune(
    moee: MoeeModel, session: Session, config: FinetuneConfig, state: Path, out: Path | str | None, *, force: bool = False,
    inputs: tuple[Path, ...] = (),
) -> None:  # fmt: skip
    """Distil the session's dense model into `moee`, in place, and save it at `out` unless that is None. `state`: the folder of
    what an interrupted run leaves."""
    moee.check_images(session.source, session.train, session.held_out, session.report)
    started, group = time.perf_counter(), session.group
    config = _within_memory(moee, session, config)
    result = finetune(
        moee.model, session.dense, session.train, config, session.report, resume=state,
        teacher=lambda: session.train_outputs.features, group=group
    )  # fmt: skip
    seconds = time.perf_counter() - started
    config = config.model_copy(update={"lr": result.lr})
    used = {**config.model_dump(), "amp": result.amp}
    losses = {"train": result.train_loss[1:], "validation": result.validation_loss}
    tuned = {
        "data": session.source, "division": session.data_facts()["division"], "seconds": seconds,
        "device": title_of(group.device), "config": used, "best_epoch": result.best_epoch, "losses": losses,
    }  # fmt: skip
    stages = moee.info["stages"]
    if isinstance(former := stages.pop("tuned", None), dict):  # an artifact that was tuned before is tuned again
        first = {key: former[key] for key in ("data", "division", "config") if key in former}
        tuned["before"] = [*former.get("before", []), first]
    if moee.recipe is not None:
        moee.recipe = replace(moee.recipe, tune=config)
    if "extracted" in stages:  # artifacts of the first release name their data once, and it may be another from now on
        own = stages["extracted"].get("data", moee.data) == moee.data  # not those of a stage in between
        read = {"data_read": moee.info["data_read"]} if own and "data_read" in moee.info else {}
        stages["extracted"] = {"data": moee.data, **read, **stages["extracted"]}
    stages["tuned"] = tuned
    moee.info["data_read"], moee.data = session.data_facts(), session.source
    with kept(moee, "tuned", out, force, group, inputs=inputs):
        stages["tuned"] = {**measured(session, moee.model, moee.probe, "tuned on held-out images"), **tuned}
        moee.info["data_read"] = session.data_facts()
    save(moee, out, force, group, inputs)


def _within_memory(moee: MoeeModel, session: Session, config: FinetuneConfig) -> FinetuneConfig:
    """The configuration, with batches in as many parts as a bound on the memory asks for. Raises `UserError` where it lacks."""
    with session.group.agreed():
        dense, image = session.dense, session.transform.shape
        try:
            ffns = find_ffns(dense, shape=image, gated=True).ffns
        except UserError:  # merged tokens alone are tuned, say; of its steps the weights are known
            ffns = []
        tokens = tokens_per_image(dense, [ffn.name for ffn in ffns], image) if ffns else {}
        parts = [moee.model] if config.train == "all" else routed_layers(moee.model).values()
        trained = sum(p.numel() for part in parts for p in part.parameters())
        return session.space.tuned(model_shape(dense, ffns, tokens, image), config, trained)
