"""CLEAR-MoE on a tiny model."""

import copy

import pytest
import torch

from moee.clear_moe import ClearConfig, convert
from tests.conftest import tiny_images


def converted(model, **kwargs):
    data = tiny_images()
    config = ClearConfig(**{"calibration_images": 40, "experts": 3, **kwargs})
    changed = copy.deepcopy(model)
    return changed, data, convert(changed, data, config)


@pytest.mark.parametrize("router", ["linear", "mlp", "centroid", "random"])
@pytest.mark.parametrize("metric", ["output", "plain"])
def test_full_rank_reproduces_the_dense_model(tiny_model, router, metric):
    model, data, reports = converted(tiny_model, rank=32, residual_rank=0, router=router, metric=metric)
    assert all(r.status == "routed" for r in reports)
    with torch.no_grad():
        torch.testing.assert_close(model(data.images), tiny_model(data.images), rtol=1e-5, atol=1e-5)
