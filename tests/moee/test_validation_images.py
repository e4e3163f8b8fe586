"""The images that choose the epoch of a tuning are those that an extraction's fits do not see."""

import copy

import pytest
import torch

from moee.calibrate import refit as refitting
from moee.config import FinetuneConfig
from moee.data.image_set import ImageSet, batches
from moee.data.validation import Part, fitted_part, other_images, validation_images
from moee.methods.context import Context
from moee.methods.heads import narrowing
from moee.methods.recipe import make_recipe
from moee.methods.registry import method_of
from moee.train.finetuning import finetune
from moee.train.step import Trainer
from tests.conftest import extract, tiny_images


def test_the_two_parts_make_the_whole_and_a_smaller_share_lies_in_a_larger():
    for count in (2, 9, 20, 137):
        for share in (0.05, 0.1, 0.5):
            judged, rest = validation_images(count, share), other_images(count, share)
            assert sorted([*judged.tolist(), *rest.tolist()]) == list(range(count))
            assert len(judged) == max(1, round(share * count))
            assert set(judged.tolist()) <= set(validation_images(count, 0.6).tolist())


@pytest.mark.parametrize("values", [{}, {"attention_macs": 0.8}, {"augment": 1, "collages": 1}])
def test_what_is_fitted_and_what_judges_the_epochs_have_no_image_in_common(tiny_model, monkeypatch, values):
    images = tiny_images()
    images.images += torch.randn(len(images), 1, 1, 1, generator=torch.Generator().manual_seed(7))
    judged = validation_images(len(images)).tolist()
    assert len(images) >= 20 and judged
    shown, measured = [], []

    def seen_by(batch):
        shown.extend(float(image[0, 0, 0]) for image in batch.images)
        return batch

    true_batches, true_measure = refitting.batches, Trainer.measure
    for fits in (refitting, narrowing):
        monkeypatch.setattr(fits, "batches", lambda *a, **k: map(seen_by, true_batches(*a, **k)))
    recipe = make_recipe("static", values={"target_macs": 0.7, "refit_lambda": 0.1, **values})
    model = copy.deepcopy(tiny_model)
    for step in recipe.first:
        method_of(step).convert(model, step, Context(images))
        assert shown
    extract(model, images, recipe.cut)
    of_judged = {float(images.images[at][0, 0, 0]) for at in judged}
    of_others = {float(images.images[at][0, 0, 0]) for at in other_images(len(images)).tolist()}
    assert of_others & set(shown) and not of_judged & set(shown)
    noted = lambda self, data, order: measured.append(order.tolist()) or true_measure(self, data, order)  # noqa: E731
    monkeypatch.setattr(Trainer, "measure", noted)
    finetune(model, tiny_model, images, FinetuneConfig(epochs=1, seed=5, lr=1e-6))
    assert measured == [judged, judged], "whatever the seed"


class Unreadable(ImageSet):
    def load(self, index):
        if index in (3, 8):
            raise ValueError("damaged")
        return torch.full((1, 2, 2), float(index))


def test_a_part_tells_the_whole_what_could_not_be_read_and_learns_it():
    whole = Unreadable("pictures", [0] * 10, 1)
    part = Part(whole, [1, 3, 5])
    assert [float(i[0, 0, 0]) for batch in batches(part, 2) for i in batch.images] == [1.0, 5.0]
    assert part.skipped == {1: "pictures[3]"} and whole.skipped == {3: "pictures[3]"}
    whole.skipped[8] = "pictures[8]"
    assert Part(whole, [8, 9]).skipped == {0: "pictures[8]"}


def test_few_images_are_all_fitted():
    few = Unreadable("pictures", [0] * 4, 1)
    assert fitted_part(few) is few and len(fitted_part(Unreadable("pictures", [0] * 20, 1))) == 18
