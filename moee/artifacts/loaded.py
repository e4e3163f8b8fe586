"""What a model was when `moee.load_model` gave it: whether it is that model still, which its name alone says nothing of.

Weights, parts, hooks and the description of its input are compared, and what it gives on a few images: an attribute that its
code reads, such as timm's `global_pool`, shows in nothing else.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moee.data.transform import model_transform
from moee.interface.adapted import run_model
from moee.mlps.proof import random_images
from moee.store.cache import tensor_hash

ROUNDING = 1e-5  # of the largest value: another number of threads adds up in another order
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class Loaded:
    """The hash of a model's weights, its parts as PyTorch prints them, the hooks of each, how its images are prepared, and what
    it gives on random images."""

    weights: str
    parts: str
    hooks: tuple[tuple[str, int], ...]
    config: dict[str, Any]
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Loaded:
        return cls(_weights(model), repr(model), _hooks(model), model_transform(model).config, _outputs(model))

    def differences(self, model: nn.Module) -> str:
        """What is another in `model`, as words; empty for nothing."""
        if _weights(model) != self.weights:
            return "weights"
        found = [
            ("parts", repr(model) != self.parts), ("hooks", _hooks(model) != self.hooks),
            ("preparation of images", model_transform(model).config != self.config),
        ]  # fmt: skip
        words = [word for word, differs in found if differs]
        return ", ".join(words) or ("" if self._gives_the_same(model) else "outputs")

    def _gives_the_same(self, model: nn.Module) -> bool:
        given = _outputs(copy.deepcopy(model).cpu().eval())
        return len(given) == len(self.outputs) and all(
            a.shape == b.shape and bool((a - b).abs().max() <= ROUNDING * a.abs().max())
            for a, b in zip(self.outputs, given, strict=True)
        )


def _weights(model: nn.Module) -> str:
    state = model.state_dict()
    return tensor_hash(*state.values(), extra=" ".join(state))


def _hooks(model: nn.Module) -> tuple[tuple[str, int], ...]:
    counts = ((name, sum(len(getattr(part, kind)) for kind in HOOKS)) for name, part in model.named_modules())
    return tuple((name, count) for name, count in counts if count)


@torch.no_grad()
def _outputs(model: nn.Module) -> tuple[Tensor, ...]:
    """The output and the last feature map; nothing of a model that does not run, of which extraction says why."""
    images = random_images(model_transform(model).shape, torch.zeros(()))
    try:
        given = run_model(model, images)
    except Exception:  # it is someone's own code
        return ()
    return tuple(each.float() for each in given if isinstance(each, Tensor))
