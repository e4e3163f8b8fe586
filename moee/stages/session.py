"""A dense model with its data: what extraction and fine-tuning share."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import LayerTokens
from moee.config import Options
from moee.data.class_names import listed
from moee.data.image_set import ImageSet, batches, say_read
from moee.data.sources import load_splits, located
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.given.images import given_splits
from moee.interface.adapted import BY_CONTENT, asks_for_values, on_meta
from moee.layers.report import LayerReport
from moee.measure.accuracy import Comparison, class_count, comparison
from moee.measure.evaluation import Outputs, retention, run
from moee.measure.metrics import dense_macs, model_cost, tokens_per_image
from moee.measure.probe import Probe, classes_told, fit_probe, head_drawn
from moee.methods.apart import check_apart
from moee.methods.context import Context
from moee.methods.exchange import check_same_data, share_dense
from moee.methods.identity import IMAGES, check_attentions, check_ffns, check_merging
from moee.methods.recipe import Recipe
from moee.methods.registry import method_of
from moee.mlps.attention import find_attentions
from moee.mlps.find import find_ffns, grouped
from moee.mlps.proof import random_images
from moee.models.ffn import FFN
from moee.models.model import ModelSpec, Shape, load_model, sharing
from moee.parallel.group import SOLO, Group
from moee.progress import Reporter, silent
from moee.schema import reason_of
from moee.space.estimate import ModelShape
from moee.space.machine import give_back
from moee.stages.reach import refuse_beyond_reach
from moee.stages.space import Space, model_shape

log = logging.getLogger("moee")
Given = tuple[Any, Any]  # training images as Python has them, and held-out ones or None
FIRST = 16  # training images among which those of the identity check are looked for
# A trial of what is to be done with the result, with the model, its MLPs and the shape of an image; raises `UserError`
Trial = Callable[[ModelSpec, nn.Module, Sequence[FFN], Shape, Reporter], float]


def _check_attentions(model: nn.Module, images: Tensor, report: Reporter) -> None:
    check_attentions(model, find_attentions(model), images, report)


def is_classifier(model: nn.Module) -> bool:
    return bool(getattr(model, "num_classes", 0))


class Session:
    """A dense model with its data: what extraction and fine-tuning share. Dense outputs are computed once.

    The data are those of `source`, or training and held-out images `given` in Python (`moee.given.images`).

    `classes`: those of an artifact or of a class map, by which the images are labelled; else the folders' own. Raises `UserError`
    unless a classifier tells as many apart. `trial` is run once the model is proved, before the work. `memory`: bytes that a
    process may take (`Space`).
    """

    def __init__(
        self, spec: ModelSpec, source: str, *, seed: int = 0, report: Reporter = silent, group: Group = SOLO, workers: int = 0,
        classes: Sequence[str] = (), trial: Trial | None = None, given: Given | None = None, memory: int | None = None,
    ):  # fmt: skip
        self.space = Space(group, memory)
        self.spec, self.source, self.report, self.group, self.trial = spec, located(source), report, group, trial
        with group.agreed():
            self.dense = load_model(spec)
            self.transform = model_transform(self.dense)
            head = getattr(self.dense, "num_classes", 0) or None
            if classes and head is not None and len(classes) != head:
                raise UserError(f"{len(classes)} classes are named, and {spec.name} tells {head} apart; name each of these")
            if given is None:
                self.train, self.held_out = load_splits(
                    source, self.transform, seed, classes or None, head, report=report, labels=spec.labels
                )
            else:
                self.train, self.held_out = given_splits(
                    *given, shape=self.transform.shape, classes=classes or None, head_classes=head, seed=seed, report=report,
                    labels=spec.labels,
                )  # fmt: skip
                self.source = self.train.name
            self.train.workers = self.held_out.workers = workers
        share_dense(self.dense, group)
        for data in (self.train, self.held_out):
            check_same_data(data, group)
        if group.leader:
            say_read(train=self.train, val=self.held_out)
        self.unlike: Sequence[str] = ()  # how a folder's images would be prepared otherwise than those that Python gave
        self._reference: Outputs | None = None
        self.dense_seconds = 0.0  # that `reference` took
        self.trial_seconds: float | None = None  # that `trial` took, once it has run
        self._train_outputs: Outputs | None = None
        self._started: dict[tuple[Options, ...], nn.Module] = {}
        self._proved: set[tuple[Any, ...]] = set()
        self._shapes: dict[tuple[Any, ...], ModelShape] = {}  # by what is proved
        self._left: dict[Any, Any] = {}
        self.made: tuple[dict[str, Any], nn.Module, Sequence[LayerReport]] | None = None  # by the recipe of that JSON

    def check_names(self, classes: Sequence[str]) -> None:
        """Raise `UserError` where `classes`, which a user names, are none of those that the images have."""
        have = {**self.train.unknown, **self.held_out.unknown}
        if classes and have and not any(label >= 0 for label in (*self.train.labels, *self.held_out.labels)):
            raise UserError(
                f"the {len(classes)} classes that are named ({listed(classes)}) are none of {self.source}, whose classes are "
                f"called {listed(list(have))}; name these"
            )

    @property
    def reference(self) -> Outputs:
        """The dense model's outputs on the held-out images."""
        if self._reference is None:
            started = time.perf_counter()
            self._reference = self._run(self.dense, self.held_out, "dense on held-out images")
            self.dense_seconds = time.perf_counter() - started
        return self._reference

    @property
    def train_outputs(self) -> Outputs:
        """The dense model's outputs on the training images: what a probe is fitted on and a student learns from."""
        if self._train_outputs is None:
            self._train_outputs = self._run(self.dense, self.train, "dense on training images")
        return self._train_outputs

    def context(self, jobs: int = 1, sampled: Sequence[LayerTokens] | None = None) -> Context:
        """What methods work with on this model and its training images."""
        limits = self.space.limits
        return Context(self.train, self.report, self.group, jobs, sampled, left=self._left, dense=self.dense, limits=limits)

    def prove(self, recipe: Recipe, jobs: int = 1) -> None:
        """See that the model was read rightly, that its costs can be counted, and that memory and disk suffice, before hours are
        spent on it.

        Raises `UserError` that names the layer whose replacement, with everything kept, does not give the dense output.
        """
        self._prove(recipe, jobs)
        self.space.share()

    def _prove(self, recipe: Recipe, jobs: int) -> None:
        method, exclude = recipe.method, getattr(recipe.cut, "exclude", ())
        mlps = ("method", method.cuts, method.gated, *exclude)
        cut = {method_of(step).cuts for step in recipe.steps}
        with self.group.agreed():
            if not self.group.leader:
                return
            for step in recipe.steps:
                method_of(step).check(self.dense, self.transform.shape, step)
            if ("apart",) not in self._proved:
                check_apart(self.dense, self._few_images()[:1])
                self._proved.add(("apart",))
            if mlps not in self._proved:
                found = find_ffns(self.dense, exclude, self.transform.shape, method.gated)
                tokens, share = self._count_costs(found.ffns, recipe)
                if found.ffns:
                    self._shapes[mlps] = model_shape(self.dense, found.ffns, tokens, self.transform.shape, share)
                    self._find_space(self._shapes[mlps], recipe, jobs)
                names = ("mlps", *(ffn.name for ffn in found.ffns))  # methods that cut the same layers share the check
                if "mlps" in cut and names not in self._proved:
                    check_ffns(self.dense, found.ffns, self._few_images(), self.report)
                    self._proved.add(names)
                if self.trial is not None:
                    self.trial_seconds = self.trial(self.spec, self.dense, found.ffns, self.transform.shape, self.report)
                if found.unscaled and "mlps" in cut:
                    log.warning(
                        "what scales the output of %s could not be proved; neurons are chosen as if nothing did",
                        grouped(found.unscaled),
                    )
                self._proved.add(mlps)
            elif mlps in self._shapes:
                self._find_space(self._shapes[mlps], recipe, jobs)
            for part, check in (("attention", _check_attentions), ("tokens", check_merging)):
                if part in cut and (part,) not in self._proved:
                    check(self.dense, self._few_images(), self.report)
                    self._proved.add((part,))

    def _find_space(self, shape: ModelShape, recipe: Recipe, jobs: int) -> None:
        """Say what memory and disk the recipe takes, and refuse it where they are not there."""
        self.space.find(shape, recipe, len(self.train), len(self.held_out), jobs=jobs, tried=self.trial is not None)

    def _count_costs(self, ffns: Sequence[FFN], recipe: Recipe) -> tuple[dict[str, int], float]:
        """Count what the reports will need; what fails must fail now, and so must a cost that the MLPs cannot meet. Tokens of an
        image that each MLP sees, and the share of the dense MACs that they take. Raises `UserError`."""
        try:
            whole = dense_macs(self.dense, self.transform.shape)
            merging = self._merging(recipe)
            tokens = tokens_per_image(merging, [ffn.name for ffn in ffns], self.transform.shape)
        except Exception as error:  # the counter runs a stranger's model on shapes alone
            reason = BY_CONTENT if asks_for_values(error) else reason_of(error)
            raise UserError(f"the MACs of {self.spec.name} cannot be counted ({reason}); choose another model") from error
        cut = sum(tokens[ffn.name] * ffn.macs for ffn in ffns)
        refuse_beyond_reach(recipe, self.dense, self.transform.shape, whole, cut)
        return tokens, cut / whole

    def _merging(self, recipe: Recipe) -> nn.Module:
        """The dense model with the tokens merged that the recipe's steps before its last merge, by its shapes alone."""
        steps = [step for step in recipe.first if method_of(step).cuts == "tokens"]
        shadow = on_meta(self.dense) if steps else self.dense
        for step in steps:
            method_of(step).convert(shadow, step, self.context())
        return shadow

    def _few_images(self) -> Tensor:
        """The first readable images [IMAGES, C, H, W] of the training set; random ones if there are none among its first."""
        order = torch.arange(min(len(self.train), FIRST))
        images = [batch.images for batch in batches(self.train, IMAGES, order=order, strict=False)]
        return (torch.cat(images) if images else random_images(self.transform.shape, next(self.dense.parameters())))[:IMAGES]

    def start(self, recipe: Recipe) -> nn.Module:
        """The model that the recipe's last step starts from: the dense one after the steps before it. Not to be changed."""
        if not recipe.first:
            return self.dense
        if recipe.first not in self._started:
            model = sharing(self.dense, self.dense)
            for step in recipe.first:
                method_of(step).convert(model, step, self.context())
            self._started[recipe.first] = model
        return self._started[recipe.first]

    def classes(self, probe: Probe | None) -> tuple[str, ...]:
        """Names of what the model's outputs, or the probe's, stand for; none where the images' classes do not fit them."""
        return self.train.classes if len(self.train.classes) == classes_told(self.dense, probe) else ()

    def data_facts(self) -> dict[str, Any]:
        """What was read, for a manifest."""
        division = self.train.division
        facts = {"train": self.train.facts(), "val": self.held_out.facts(), "notes": list(self.train.notes)}
        return {**facts, "division": asdict(division) if division is not None else None}

    def _run(self, model: nn.Module, data: ImageSet, message: str) -> Outputs:
        found = run(model, data, self.report, message, self.space.limits.forward, group=self.group)
        give_back()
        return found

    def probe(self) -> Probe | None:
        """A probe on the dense features of the training images; None for classifiers, and where the labels are of fewer than two
        classes. Classes without a training image are named: the probe never answers with one."""
        if is_classifier(self.dense):
            return None
        counts = Counter(label for label in self.train.labels if label >= 0)
        if not self.train.labelled or len(counts) < 2:
            if counts and self.group.leader:
                log.warning("the labelled training images of %s are of one class: no probe is fitted", self.source)
            return None
        outputs, found = self.train_outputs, None
        with self.group.agreed():
            if self.group.leader:
                classes = class_count(self.train.labels, self.train.num_classes)
                names = dict(enumerate(self.train.classes))
                absent = [names.get(c, str(c)) for c in range(classes) if not counts[c]]
                if absent:
                    log.warning("%s has no training image of %s: the probe never answers so", self.source, listed(absent))
                found = fit_probe(outputs.features, outputs.labels, classes)
        return found

    def comparison(self, probe: Probe | None) -> Comparison:
        """Whether accuracy on the held-out images can be compared with the dense model's, which runs on them. Of the leader."""
        logits = self.reference.features if probe is None else probe.logits(self.reference.features)
        told = classes_told(self.dense, probe)
        drawn = head_drawn(self.spec, probe)
        return comparison(
            self.reference.labels, self.held_out.num_classes, told, self.held_out.name, logits=logits, drawn=drawn,
            probe=probe is not None, unknown=self.held_out.unknown,
        )  # fmt: skip

    def early_comparison(self, probe: Probe | None = None) -> Comparison:
        """What models and labels alone, with nothing run yet, say of a comparison of accuracies."""
        told = classes_told(self.dense, probe)
        drawn = told > 0 and head_drawn(self.spec, probe)
        if told == 0 and len({label for label in self.train.labels if label >= 0}) > 1:
            told = class_count(self.train.labels, self.train.num_classes)  # as the probe will
        data = self.held_out
        return comparison(data.labels, data.num_classes, told, data.name, drawn=drawn, unknown=data.unknown)

    def warn_early(self, probe: Probe | None = None) -> None:
        """Say before the work that accuracies will not be compared, where the user can change that."""
        early = self.early_comparison(probe)
        if early.cure and self.group.leader:
            log.warning("accuracy will not be compared: %s", early.advised)

    def measure(self, model: nn.Module, probe: Probe | None, message: str) -> dict:
        """Retention on held-out images, and cost weighted by the routing measured on them; empty on ranks other than 0."""
        reference, outputs = self.reference, self._run(model, self.held_out, message)
        with self.group.agreed():
            if not self.group.leader:
                return {}
            kept = retention(reference, outputs, probe, classes_told(self.dense, probe), self.comparison(probe))
            cost = model_cost(self.dense, model, outputs.shares, self.transform.shape)
        return {"retention": kept.to_json(), "cost": cost, "shares": outputs.shares}
