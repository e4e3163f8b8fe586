"""The memory and disk that a recipe takes on a session's model and images: said, kept within a bound, or refused."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple

from torch import nn

from moee.calibrate.options import MEASURED, CalibrationOptions, GroupingOptions, RefitOptions, SelectionOptions
from moee.config import FinetuneConfig, Options
from moee.errors import MissingDependency
from moee.methods.clear_moe.options import DecompositionOptions
from moee.methods.corp.options import CorpOptions
from moee.methods.heads.method import HeadsOptions
from moee.methods.recipe import Recipe
from moee.methods.static import StaticOptions
from moee.methods.tokens import TokensOptions
from moee.models.ffn import FFN
from moee.models.model import Shape
from moee.parallel.group import Group, Parcel
from moee.parallel.machine import startable_threads
from moee.shrinking.options import ShrinkConfig
from moee.space.estimate import Extraction, LayerShape, ModelShape, Need, extraction, passes, shrinking, trial, tuning
from moee.space.limits import USUAL, Limits
from moee.space.refusal import limits_within, loaded, refuse_without_space, say_space, worst

log = logging.getLogger("moee")

Stages = Callable[[ModelShape, Extraction, Limits], list[Need]]
EXPERTS = 8  # of a layer, where the clustering says how many there are
GRAPHS = "graphs and their timings are not counted"  # of commands that try many models


def model_shape(
    model: nn.Module, ffns: Sequence[FFN], tokens: Mapping[str, int], image: Shape, share: float = 1.0
) -> ModelShape:
    """The dense `model` with the MLPs that are cut, which see so many `tokens` of an `image` [C, H, W] and take so much of its
    MACs."""
    channels, height, width = image
    layers = tuple(LayerShape(ffn.dim, ffn.hidden, tokens[ffn.name], ffn.neuron_macs // ffn.dim) for ffn in ffns)
    return ModelShape(sum(p.numel() for p in model.parameters()), channels * height * width, layers, share)


def extraction_of(
    options: Options, images: int, held_out: int, jobs: int = 1, *, first: Sequence[Options] = (), share: float = 1.0
) -> Extraction | None:
    """What the options of a method, and of the steps `first` before it, ask for on `images` training images of a model whose
    MLPs take so large a `share` of its MACs; None of a method that calibrates nothing."""
    more: dict[str, int | float] = {}
    for step in first:
        if isinstance(step, HeadsOptions):
            more |= {"narrowed": step.attention_tokens, "probes": step.attention_probes}
    if isinstance(options, DecompositionOptions):
        decomposed = min(images, options.calibration_images)
        return Extraction(images, held_out, options.tokens, decomposed=decomposed, **more)  # type: ignore[arg-type]
    if isinstance(options, TokensOptions):
        return Extraction(images, held_out, 0, **more)  # type: ignore[arg-type]
    if not isinstance(options, CalibrationOptions):
        return None
    if isinstance(options, StaticOptions) and options.target_macs and not first:  # else something is saved before
        more["kept"] = max(1 - (1 - options.target_macs) / share, options.mlp_floor or 0)
    if isinstance(options, CorpOptions):
        more["solved"] = options.target_macs or options.keep
    if isinstance(options, GroupingOptions):
        more |= {
            "clustered": options.cluster_tokens, "by_density": options.by_density, "components": options.components is not None,
            "experts": options.clusters or EXPERTS, "jobs": jobs,
        }  # fmt: skip
    if isinstance(options, SelectionOptions) and (options.criterion in MEASURED or options.neurons == "eliminated"):
        more |= {"objectives": 2 if options.objective == "both" else 1, "measured": options.sensitivity_tokens}
    if isinstance(options, RefitOptions) and options.compensation == "refit":
        more |= {"refitted": options.refit_tokens, "stream": options.refit_target == "stream"}
    views = 1 + options.collages + (options.augment if isinstance(options, RefitOptions) else 0)
    return Extraction(images=images * views, held_out=held_out, tokens=options.tokens, **more)  # type: ignore[arg-type]


class Space:
    """What a session says of its memory and disk, and the `limits` of its pieces of work. `memory`: bytes that a process may
    take; without a bound pieces are of the usual size. What a GPU holds is not estimated: there the disk alone is looked at."""

    def __init__(self, group: Group, memory: int | None = None):
        self.group, self.memory, self.limits = group, memory, USUAL
        self._said = 0  # bytes of memory and disk
        self.beside = ""  # what the command does beside, without an estimate

    def find(
        self, shape: ModelShape, recipe: Recipe, images: int, held_out: int, *, jobs: int = 1, tried: bool = False
    ) -> None:
        """Cut the work that a recipe asks for into pieces that the memory holds, and say what it takes. `tried`: whether an
        export is tried first. Of rank 0 alone. Raises `UserError` where memory or disk do not suffice."""
        world = self.group.world
        work = extraction_of(recipe.cut, -(-images // world), -(-held_out // world), jobs, first=recipe.first, share=shape.share)
        if work is not None:
            self._find(shape, work, extraction, [trial(shape.weights)] * tried)

    def shrunk(self, shape: ModelShape, config: ShrinkConfig, images: int, held_out: int, experts: int) -> None:
        """The same for `experts` a layer that become fewer. `shape`: of the model that has them, whose weights lie beside the
        dense ones."""
        refitted = config.refit_tokens if config.experts is not None else 0
        self._find(shape, Extraction(images, held_out, config.tokens, experts=experts, refitted=refitted), shrinking)

    def _find(self, shape: ModelShape, work: Extraction, stages: Stages, more: Sequence[Need] = ()) -> None:
        """Cut `work` into pieces, and say what its `stages` take, and `more` of them."""
        folder, weights = tempfile.gettempdir(), shape.weights
        if self.memory is not None:
            least = max(layer.hidden for layer in shape.layers)  # tokens: a neuron one
            found = limits_within(self.memory, weights, lambda some: stages(shape, work, some), work.refitted, least)
            self.limits = self.limits.tighter(found)
        on_cpu = self.group.device.type == "cpu"
        needs = [*(need for need in stages(shape, work, self.limits) if on_cpu or need.disk_bytes), *more]
        refuse_without_space(needs, weights, self.memory if on_cpu else None, folder)
        self._refuse_without_threads(passes(work, self.limits) * (1 + work.stream) if work.refitted else 0)
        size = worst(needs).memory_bytes + sum(need.disk_bytes for need in needs)
        if size <= self._said:
            return
        self._said = size
        say_space(needs, weights, folder, self.beside)
        if (left := self.limits.refitted(work.refitted)) < work.refitted:
            log.warning("the bound on the memory leaves the refit %s of its %s tokens a layer", f"{left:,}", f"{work.refitted:,}")

    @staticmethod
    def _refuse_without_threads(count: int) -> None:
        """Raise `MissingDependency` unless the refit's passes can be started, each in a thread of its own."""
        there = startable_threads(count + 1)  # and one that groups the layers' tokens
        if there <= count:
            raise MissingDependency(
                f"the refit runs up to {count + 1} threads side by side, and {there} can be started; raise the limit on "
                "processes and threads (ulimit -u)"
            )

    def tuned(self, shape: ModelShape, config: FinetuneConfig, trained: int) -> FinetuneConfig:
        """The configuration of a fine-tuning of so many `trained` weights, with batches in as many parts as the memory asks for.
        On every rank. Raises `UserError` where memory does not suffice."""
        if self.group.device.type != "cpu":
            return config
        batch = -(-config.batch_size // self.group.world)

        def need() -> Need:
            return tuning(shape, batch, config.accumulate, trained, config.checkpointing)

        while self.memory is not None and loaded(shape.weights) + need().memory_bytes > self.memory and config.accumulate < batch:
            config = config.model_copy(update={"accumulate": min(batch, 2 * config.accumulate)})
        refuse_without_space([need()], shape.weights, self.memory)
        if self.group.leader:
            say_space([need()], shape.weights)
        return config

    def share(self) -> None:
        """Rank 0's limits on every rank, which all call it."""
        if self.memory is not None:
            self.limits = Limits(*self.group.broadcast(Parcel(list(astuple(self.limits)))).body)
