"""What an MLP of a model is."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from moee.layers.activations import activate
from moee.models.model import Shape


@dataclass(frozen=True)
class FFN:
    """One MLP of a model. Weights are views: `w_up` [H, D], `b_up` [H], `w_down` [D, H], `b_down` [D].

    `scale` [D] is the LayerScale that follows the MLP, or None. `channels_first` marks 1x1-convolution MLPs on [B, D, H, W].
    `biases`: whether the model has `b_up` and `b_down`, or they are zeros that stand for nothing.

    `name` is the path of the module that is the MLP. Where its parts lie apart, `name` is its up map's path, and `bypassed` are
    those of its activation and its down map.
    """

    name: str
    activation: str
    w_up: Tensor
    b_up: Tensor
    w_down: Tensor
    b_down: Tensor
    scale: Tensor | None
    channels_first: bool
    biases: tuple[bool, bool] = (True, True)
    bypassed: tuple[str, ...] = ()

    @property
    def output_name(self) -> str:
        """Path of the module that gives the MLP's output in the dense model; `name` is the one that reads its input."""
        return self.bypassed[-1] if self.bypassed else self.name

    @property
    def dim(self) -> int:
        return self.w_up.shape[1]

    @property
    def hidden(self) -> int:
        return self.w_up.shape[0]

    @property
    def params(self) -> int:
        """Trainable numbers of the MLP."""
        return 2 * self.dim * self.hidden + self.biases[0] * self.hidden + self.biases[1] * self.dim

    @property
    def neuron_macs(self) -> int:
        """Multiply-accumulates a token of one hidden neuron."""
        return 2 * self.dim

    @property
    def maps_in(self) -> tuple[Tensor, ...]:
        """The maps [H, D] that read its input."""
        return (self.w_up,)

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token."""
        return self.neuron_macs * self.hidden

    @property
    def gated(self) -> bool:
        """Whether it is gated. Such an MLP is pruned; it gets no experts."""
        return False

    @property
    def formula(self) -> str:
        """What it computes, in the names of its parts."""
        return "fc2(act(fc1(x)))"

    def routing_macs(self, experts: int) -> int:
        """Multiply-accumulates a token that choosing among `experts` costs; of one there is nothing to choose."""
        return experts * self.dim if experts > 1 else 0

    def to(self, device: torch.device) -> FFN:
        """The same MLP with its tensors on `device`."""
        if self.w_up.device == device:
            return self
        own: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in own.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def activations(self, tokens: Tensor) -> Tensor:
        """Hidden activations [n, H], of which the down map is a linear function, for input tokens [n, D]."""
        return activate(torch.addmm(self.b_up, tokens, self.w_up.T), self.activation)

    def target(self, tokens: Tensor) -> Tensor:
        """Outputs [n, D] less the bias `b_down`, for input tokens [n, D]."""
        return self.activations(tokens) @ self.w_down.T

    def readings(self) -> tuple[FFN, ...]:
        """The functions that its parts may form; a run shows which one they do."""
        return (self,)

    def proof(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [n, D] for float32 tokens [n, D], and the absolute sum of what is added up for each: rounding grows with it."""
        w_up, w_down, b_up, b_down = (t.float() for t in (self.w_up, self.w_down, self.b_up, self.b_down))
        hidden = activate(torch.addmm(b_up, tokens, w_up.T), self.activation)
        # a bias may be in every partial sum and so in each rounding; these are like a random walk
        first, last = b_up.abs() * self.dim**0.5, b_down.abs() * self.hidden**0.5
        before = torch.addmm(first, tokens.abs(), w_up.abs().T)  # activations stretch differences by 1.13 at most
        return torch.addmm(b_down, hidden, w_down.T), torch.addmm(last, before + hidden.abs(), w_down.abs().T)


def plain_size(shape: Shape) -> int | list[int]:
    """Height and width as manifests say them: one number for a square."""
    _, height, width = shape
    return height if height == width else [height, width]


def channels_last(features: Tensor, model: nn.Module) -> Tensor:
    """A last feature map [B, ..., D] of `model` whichever way it comes: ConvNeXt's is [B, D, H, W]."""
    return features if features.shape[-1] == model.num_features else features.movedim(1, -1)
