"""A model whose output of an image is not the image's own is refused before the work."""

import pytest
import torch
from torch import nn

from moee import api
from moee.errors import UserError
from moee.methods.apart import check_apart
from tests.conftest import tiny_images


class OfItsBatch(nn.Module):
    """The tiny ViT with something done to its outputs [B, 10] that looks at more than one image, or at none."""

    num_classes, image_size = 10, 32

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change, self.runs = model, change, 0
        if change is of_statistics:
            self.norm = nn.BatchNorm1d(10, track_running_stats=False)

    def forward(self, images):
        self.runs += 1
        return self.change(self, self.model(images))


def of_statistics(model, y):
    return model.norm(y)


def capacity(model, y):
    """As routing with a capacity does: half of the batch's numbers are kept."""
    return torch.where(y >= y.flatten().median(), y, 0)


class Stuck(nn.BatchNorm2d):
    """A norm that eval() does not reach."""

    def train(self, mode=True):
        return super().train(True)


OFF = "alone it is off by .* % of the output's size"
STATISTICS = "takes? the statistics of the batch: give it running statistics and eval mode"
BATCH = {
    "a centred batch": (lambda m, y: y - y.mean(0), OFF + "; a device"),
    "a little of the others": (lambda m, y: y + 1e-3 * y.mean(0), OFF),
    "the first image": (lambda m, y: y - 0.5 * y[:1], OFF),
    "the place in the batch": (lambda m, y: y + 0.1 * torch.arange(len(y))[:, None], OFF),
    "a norm of the batch": (lambda m, y: y / y.norm(), OFF),
    "attention over the batch": (lambda m, y: torch.softmax(y @ y.T, -1) @ y, OFF),
    "a capacity": (capacity, OFF),
    "statistics that are not kept": (of_statistics, f"does not run on one image alone .*`norm` {STATISTICS}"),
}  # fmt: skip
AGAIN = {
    "dropout": lambda m, y: nn.functional.dropout(y, 0.1, training=True),
    "a little noise": lambda m, y: y + 1e-4 * torch.randn_like(y),
    "a counter": lambda m, y: y * (1 + 1e-4 * m.runs),
}


@pytest.mark.parametrize("what", BATCH)
def test_an_output_that_depends_on_the_batch_is_refused(tiny_model, what):
    change, says = BATCH[what]
    with pytest.raises(UserError, match=says):
        check_apart(OfItsBatch(tiny_model, change).eval(), tiny_images(1).images)


@pytest.mark.parametrize("what", AGAIN)
def test_an_output_that_is_another_each_time_is_refused(tiny_model, what):
    with pytest.raises(UserError, match="gives another output each time for the same image, .* % of the output's size apart"):
        check_apart(OfItsBatch(tiny_model, AGAIN[what]).eval(), tiny_images(1).images)


@pytest.mark.parametrize("norm", [Stuck(10), nn.BatchNorm2d(10, track_running_stats=False)])
def test_statistics_of_a_batch_are_named_where_one_image_has_some(norm):
    """A norm over the places of a map runs on one image too."""
    model = nn.Sequential(nn.Conv2d(3, 10, 8, 8), norm, nn.GELU(), nn.Flatten(), nn.Linear(160, 5)).eval()
    with pytest.raises(UserError, match=f"{OFF}; `1` {STATISTICS}; a device"):
        check_apart(model, tiny_images(1).images)


def test_images_that_are_alike_do_not_hide_it(tiny_model):
    images = tiny_images(1).images.expand(2, -1, -1, -1)
    with pytest.raises(UserError, match="depends on the other images"):
        check_apart(OfItsBatch(tiny_model, lambda m, y: y - 0.5 * y.mean(0)).eval(), images)


def test_what_is_the_images_own_passes_and_extraction_asks(tiny_model):
    model = OfItsBatch(tiny_model, lambda m, y: y * 2).eval()
    check_apart(model, tiny_images(2).images)
    check_apart(tiny_model, tiny_images(2).images * 1e4)
    data = tiny_images(16)
    wrong = OfItsBatch(tiny_model, BATCH["a centred batch"][0])
    with pytest.raises(UserError, match="OfItsBatch's output of an image depends on the other images of its batch"):
        api.extract(wrong, (data.images, torch.tensor(data.labels)), preset="static", keep=0.8)
