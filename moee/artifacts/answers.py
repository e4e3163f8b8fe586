"""What a model made of someone's own code gives on random images, by which it is known again.

Its weights have a hash. What its code makes of them, and an attribute that the code reads, show in nothing but its outputs.
"""

from __future__ import annotations

import torch
from torch import nn

from moee.data.transform import model_transform
from moee.errors import UserError
from moee.interface.adapted import title_of_model
from moee.mlps.proof import random_images
from moee.places.resume import alike

CODED = ("python", "module")  # libraries whose models are the user's code
KEPT = 16  # numbers an image


@torch.no_grad()
def answers_of(model: nn.Module) -> list[list[float]]:
    """The first `KEPT` outputs for each of two random images; nothing of a model that gives none there, or no numbers."""
    images = random_images(model_transform(model).shape, torch.zeros(()))[:2].to(next(model.parameters()).device)
    try:
        output = model(images)
    except Exception:  # any code may stand behind it
        return []
    if not torch.isfinite(output).all():
        return []
    return [[float(f"{value:.6g}") for value in row[:KEPT].tolist()] for row in output.float().cpu()]


def check_answers(model: nn.Module, recorded: list[list[float]]) -> None:
    """Raise `UserError` where `model`, read again, does not give what was recorded of it; a record that lacks says nothing."""
    if not alike(recorded, answers_of(model)):
        raise UserError(
            f"{title_of_model(model)} has the weights that the artifact was made from and gives other outputs than then: its "
            "code, or an attribute that it reads, has changed; give the model of then, or extract again"
        )
