"""What each layer of a plan's winner does, and what it costs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moee.data.image_set import batches
from moee.layers.routed import RoutedLayer, routed_layers
from moee.measure.metrics import mean_cosine
from moee.methods.recipe import read_recipe_json
from moee.mlps.sites import mlp_replaced
from moee.planning.budget import Point
from moee.planning.search import PLAN_POINT, Planner
from moee.progress import Reporter, silent
from moee.stages.session import Session

ALONE_IMAGES = 32


def layer_table(session: Session, planner: Planner, winner: Point, report: Reporter = silent) -> list[dict[str, Any]]:
    """Per MLP of the winner: share of the neurons a token uses, and the cosine of the model's output if this layer alone is
    replaced (measured on the first held-out images). Empty for dense."""
    if winner.recipe is None:
        return []
    model, reports = planner.made(winner)
    images = next(batches(session.held_out, ALONE_IMAGES)).images
    reference = session.reference.features[: len(images)]
    base = session.start(read_recipe_json(winner.recipe, PLAN_POINT))
    rows = []
    routed = routed_layers(model)
    for position, layer in enumerate(reports, 1):
        row = {"name": layer.name, "status": layer.status, "kept": layer.mean_width / layer.hidden, "cosine_alone": 1.0}
        if layer.name in routed:
            row["cosine_alone"] = _alone(base, layer.name, routed[layer.name], images, reference)
        rows.append(row)
        report("each layer alone", position, len(reports))
    return rows


def _alone(dense: nn.Module, name: str, layer: RoutedLayer, images: Tensor, reference: Tensor) -> float:
    with mlp_replaced(dense, name, layer, layer.bypassed), torch.inference_mode():
        return mean_cosine(dense(images), reference)
