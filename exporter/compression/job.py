"""The stages of `moee compress`, one after another; each leaves an artifact, and a job that was interrupted goes on at the first
that is missing."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from exporter.compression.announcement import announce
from exporter.compression.clock import Clock, Trials, duration, images_within
from exporter.compression.refusals import Tried, refuse_early
from exporter.compression.request import ALLOCATION, BASE, Request, default_budget, widened
from exporter.compression.state import TIMINGS, Compressed, State, reported, resumable
from exporter.compression.tuning import epochs_within, too_short, within, worth
from exporter.compression.verdicts import last_lines, slower
from exporter.engines.plugin_cache import ensure_kernels
from exporter.graph.export import export
from exporter.graph.runtime_graph import PRECISION as FP32
from exporter.graph.runtime_graph import serves
from exporter.plots import write_examples
from exporter.report import write_report
from exporter.ship.cpu_bundle import write_cpu_bundle
from exporter.ship.deployment import write_deployment
from exporter.targets.registry import target_of
from exporter.timing.latency import bench
from exporter.verification import verify
from exporter.verification.write import write_result
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.config import FinetuneConfig
from moee.data.image_set import ImageSet, batches
from moee.data.sources import located
from moee.errors import StepFailed
from moee.layers.routed import routed_layers
from moee.methods.recipe import read_recipe_json
from moee.places.resume import alone_on, fingerprint, fingerprints
from moee.places.staged_folder import StagedFolder
from moee.planning.budget import Budget
from moee.planning.plan import PLAN, make_plan
from moee.progress import Reporter, silent
from moee.stages.confirmation import confirmed, fresh_images
from moee.stages.extract import run_extract
from moee.stages.finetune import run_finetune
from moee.stages.identity import model_identity
from moee.stages.session import Session
from moee.store.artifact import read_json

log = logging.getLogger("moee")
PAIRS, SECONDS = 40, 5.0  # of the timing at the end, at least
BATCHES = (1, 8, 32)  # of the bundle's profile


@dataclass
class Job:
    """A compression of the session's model into `place`. `say` gets the sentences on the way; `word` is the user's function that
    the model comes from, where it comes from one."""

    session: Session
    place: StagedFolder
    request: Request
    report: Reporter = silent
    say: Callable[[str], None] = log.info
    word: Any = None
    clock: Clock = field(init=False)
    fresh: list[ImageSet] = field(init=False, default_factory=list)  # that confirm the choice

    def run(self) -> Compressed:
        """Raises `BudgetUnmet` where nothing meets a limit of the latency or the size, `StepFailed` if the result does not
        verify, `UserError` for what cannot be done; what was done until then stays, and the same call goes on from it."""
        self.clock = Clock(self.request.time_s)
        with alone_on(self.place.place):
            budget, guessed = (self.request.budget, "") if self.request.budget else default_budget(self.session)
            state = State(self.place, self._identity(budget))
            if guessed:
                self.say(guessed)
            tried = None if state.done("plan") else refuse_early(self.session, self.request, budget, self.say)
            if self.request.confirm is not None:
                self.fresh = fresh_images(self.session, self.request.confirm)
                self.clock.confirming = sum(map(len, self.fresh))
            self.clock.trial_s = self.session.trial_seconds if tried else state.stages["plan"].get("trial_export_seconds")
            state.open()
            with resumable(self.place.path):
                return self._run(state, budget, tried)

    def _identity(self, budget: Budget) -> dict[str, Any]:
        session = self.session
        images = dict(zip(("train", "val"), fingerprints(session.train, session.held_out, self.report), strict=True))
        return {"model": model_identity(session), "images": images, **self.request.to_json(), "budget": budget.model_dump()}

    def _run(self, state: State, budget: Budget, tried: Tried | None) -> Compressed:
        announce(self.session, self.request, self.clock, budget, self.say)
        plan = self._plan(state, budget, tried)
        point, shipped, tuned = self._candidate(state, plan, budget)
        unshipped = state.stages.get("unshipped", {}).get("why", "")  # of an interrupted job
        latencies = self._export(state, "dense" if unshipped else shipped)
        if latencies and (slow := slower(latencies, budget, self.request.device, point["latency"])):
            unshipped = f"since {slow}"
            state.begin("unshipped")
            state.add("unshipped", {"why": unshipped})
            latencies = self._export(state, "dense")
        if unshipped:
            shipped, tuned = "dense", ""
        moee = self._made(shipped)
        self._verify(state, moee, budget)
        self._bundle(state, moee)
        confirmation = self._confirm(state, shipped, moee)
        if shipped != "dense" and not state.done("examples") and (images := images_within(self.clock)):
            with self._stage("examples", state) as facts:
                facts["images"], file, source = images, self.place.file("examples.json").place, self.place.folder(shipped).place
                write_examples(
                    moee, self.session.held_out, file, images=images, dense=self.session.dense, source=source, force=True,
                    report=self.report,
                )  # fmt: skip
        measured = moee.info["stages"].get(shipped)
        lines = last_lines(
            self.place, self.request.device, plan, budget, measured, latencies=latencies, point=point, tuned=tuned,
            unshipped=unshipped, confirmation=confirmation,
        )  # fmt: skip
        with self._stage("report"):
            paths, why = reported(self.place.place, shipped)
            write_report(paths, self.place.place / "report.html", force=True, no_examples=why, lines=lines)
        if self.clock.left < 0:
            self.say(f"it took {duration(self.clock.spent)}, longer than the {duration(self.clock.seconds or 0)} it was given")
        what = "dense" if shipped == "dense" else point["method"]
        state.finish({"shipped": what, "model": shipped, "lines": lines, "seconds": self.clock.spent})
        return Compressed(self.place.place, what, shipped, lines, self.clock.spent, state.stages)

    def _candidate(self, state: State, plan: dict[str, Any], budget: Budget) -> tuple[dict[str, Any], str, str]:
        """The point that is to be shipped, the folder of its model, and what tuning did. A point that misses the budget is taken
        only if tuning brings it within; else the plan's winner is."""
        point, winner = plan["ambitious"], plan["winner"]
        tried = sum(each["method"] != "dense" for each in plan["points"])
        beyond = point["recipe"] != winner["recipe"]
        if beyond and "fallback" not in state.stages:
            if state.done("tuned") or epochs_within(self.clock):
                self._extract(state, point, tried)
                tuned = self._tune(state, budget)
                if state.stages["tuned"]["kept"] and within(budget, self._made("tuned").info["stages"]["tuned"]["retention"]):
                    return point, "tuned", tuned
                self.say("tuning did not bring the fastest candidate within the budget: the next one is taken")
            state.begin("fallback")
            for name in ("tuned", "extracted"):  # a report would show them for what is shipped
                self.place.folder(name).remove()
            state.add("fallback", {"from": point["method"]})
        if winner["recipe"] is None:
            return (winner, "dense", "") if beyond else (point, "dense", "")
        self._extract(state, winner if beyond else point, tried)
        tuned = self._tune(state, budget)
        return winner if beyond else point, "tuned" if state.stages["tuned"]["kept"] else "extracted", tuned

    @contextmanager
    def _stage(self, name: str, state: State | None = None) -> Iterator[dict[str, Any]]:
        """A stage with one line at its end; its facts and its seconds are written down."""
        started, facts = time.perf_counter(), dict[str, Any]()
        if state is not None:
            state.begin(name)
        self.report(name, 0, 1)
        yield facts
        self.report(name, 1, 1)
        if state is not None:
            state.add(name, {**facts, "seconds": round(time.perf_counter() - started, 3)})

    def _plan(self, state: State, budget: Budget, tried: Tried | None) -> dict[str, Any]:
        target = self.place.folder("plan").place
        if tried is not None:
            methods, heads, tokens = tried
            device = target_of(self.request.device, batch=self.request.batch, sm=self.request.sm)
            latency = device.timing(self.session, self.report)
            with self._stage("plan", state) as facts:
                facts["trial_export_seconds"] = self.clock.trial_s
                make_plan(
                    self.session, budget, target, methods=methods, allocations=ALLOCATION, attention=heads, tokens=tokens,
                    base=BASE, latency=latency, force=True, report=self.report, over=Trials(self.clock, self.say),
                    slack=self._slack(budget),
                )  # fmt: skip
            if late := self.clock.overrun:
                self.say(late)
        plan: dict[str, Any] = read_json(target / PLAN)
        return plan

    def _slack(self, budget: Budget) -> Budget | None:
        """A wider budget for trials, where there will be time to tune what they find."""
        return widened(budget) if self.clock.tunes else None

    def _extract(self, state: State, point: dict[str, Any], tried: int) -> None:
        if not state.done("extracted"):
            with self._stage("extracted", state):
                self.place.folder("tuned.resume").remove()  # of another model
                run_extract(
                    self.session.spec, self.session.source, read_recipe_json(point["recipe"], PLAN),
                    self.place.folder("extracted").place, force=True, report=self.report, session=self.session, among=tried,
                )  # fmt: skip

    def _tune(self, state: State, budget: Budget) -> str:
        """Distil as long as the time allows, and keep the result if it is no worse; what became of it, for the last lines. A
        tuning that was interrupted is finished with the epochs that it began with."""
        facts = state.stages.get("tuned")
        if facts is None or facts["kept"] and not state.done("tuned"):
            begun = state.stages.get("tuning") if self.place.folder("tuned.resume").place.is_dir() else None
            epochs = begun["epochs"] if begun else epochs_within(self.clock)
            if not epochs:
                why = too_short(self.clock)
                self.say(f"not tuned: {why}")
                state.add("tuned", {"epochs": 0, "kept": False, "why": why})
            else:
                state.add("tuning", {"epochs": epochs})
                with self._stage("tuned", state) as facts:
                    made = run_finetune(
                        self.place.folder("extracted").place, FinetuneConfig(epochs=epochs), self.place.folder("tuned").place,
                        force=True, report=self.report, session=self.session, model=self.word,
                    )  # fmt: skip
                    facts.update(worth(made, epochs, budget))
                    if not facts["kept"]:
                        self.place.folder("tuned").remove()  # a report would show it for what is shipped
        facts = state.stages["tuned"]
        if facts["kept"]:
            return f", tuned for {facts['epochs']} epoch{'s' if facts['epochs'] > 1 else ''}"
        return f" (not tuned: {facts['why']})"

    def _made(self, shipped: str) -> MoeeModel:
        """The model that is shipped, from its folder; the dense one as it is."""
        if shipped == "dense":
            session = self.session
            probe = session.probe()
            info: dict[str, Any] = {"stages": {}, "layers": [], "data_read": session.data_facts()}
            return MoeeModel(
                copy.deepcopy(session.dense).eval(), session.spec, None, session.source, probe, info, session.classes(probe)
            )
        return checkpoint.load(self.place.folder(shipped).place, self.word)

    def _export(self, state: State, shipped: str) -> list[dict[str, Any]]:
        """Graphs, and their timings at one image and at the batch; none of the dense model, which there is nothing to time
        against."""
        folder = self.place.folder("export").place
        if not state.done("export"):
            with self._stage("export", state):
                source, moee = None if shipped == "dense" else self.place.folder(shipped).place, self._made(shipped)
                ops = self.request.sm is None and serves(routed_layers(moee.model), FP32, self.report)
                export(
                    moee, folder, force=True, report=self.report, source=source, dense=shipped == "dense", runtime_ops=ops
                )  # fmt: skip
        if shipped == "dense":
            return []
        files = [self.place.file(name) for name in TIMINGS]
        if not state.done("latency"):
            with self._stage("latency", state):
                for file, batch in zip(files, (1, self.request.batch), strict=True):
                    images = next(batches(self.session.held_out, batch)).images.numpy()
                    file.place.parent.mkdir(exist_ok=True)
                    result = bench(
                        folder, batch, runs=PAIRS, duration_s=SECONDS, images=images, report=self.report,
                        named=located(self.session.held_out.name),
                    )  # fmt: skip
                    file.write_json(result.to_json())
        return [read_json(file.place) for file in files]

    def _verify(self, state: State, moee: MoeeModel, budget: Budget) -> None:
        if state.done("verify"):
            return
        with self._stage("verify", state) as facts:
            result = verify(
                self.place.folder("export").place, moee, self.session.held_out, max_drop_pp=budget.max_drop, report=self.report
            )
            write_result(self.place.folder("verify"), result)
            facts.update(passed=bool(result), max_abs_error=result.parity.max_abs_error)
            if not result:
                failed = next((f"{c.name}: {c.failure}" for c in result.cases() if c.failure), "")
                details = self.place.folder("verify").place
                raise StepFailed(f"the export does not verify ({failed}); nothing was bundled, and {details} has the details")

    def _confirm(self, state: State, shipped: str, moee: MoeeModel) -> dict[str, Any] | None:
        """The result measured on images that nothing was chosen by, where the user gave some; anew where they are others now."""
        source, before = self.request.confirm, state.stages.get("confirm", {})
        if source is None or shipped == "dense":
            return None
        content = " ".join(fingerprint(part, self.report, "images of --confirm") for part in self.fresh)
        if (before.get("data"), before.get("content")) != (located(source), content):
            with self._stage("confirm", state) as facts:
                facts.update(confirmed(self.session, moee.model, moee.probe, self.fresh, source), content=content)
        return state.stages["confirm"]

    def _bundle(self, state: State, moee: MoeeModel) -> None:
        if state.done("bundle"):
            return
        export_dir, out = self.place.folder("export").place, self.place.folder("bundle").place
        with self._stage("bundle", state) as facts:
            if self.request.sm is None:
                write_cpu_bundle(export_dir, out, force=True, word=self.word, probe=moee.probe)
            else:
                kernels = partial(ensure_kernels, (self.request.sm,), self.report)
                write_deployment(
                    export_dir, out, self.request.sm, kernels, BATCHES, force=True, word=self.word, probe=moee.probe
                )  # fmt: skip
            facts["sm"] = self.request.sm
