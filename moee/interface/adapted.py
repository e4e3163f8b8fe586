"""One way to run any model: timm's as they are, models of other libraries in a wrapper that speaks as timm's do.

What the project asks of a model is its output [B, C], its last feature map, `num_classes`, `num_features`, `num_prefix_tokens`
and timm's description of its input (`pretrained_cfg`). timm's models have all of it; `AdaptedModel` gives it to others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moee.errors import UserError

StateFilter = Callable[[dict[str, Tensor], nn.Module], Mapping[str, Any]]  # tensors of a file in the names and sizes of a model
OUTPUTS = ("logits", "image_embeds", "pooler_output")  # of transformers, in this order
BY_CONTENT = "what it computes for an image depends on the values of its tensors, as where a mixture of experts picks tokens"


@dataclass(frozen=True)
class Description:
    """What is known of a model of another library; paths are submodules of the model itself.

    `features` is the submodule that gives the last feature map, None where there is none. `num_classes` is 0 for a model that
    ends in features, of which `output_width` are given. `classifier`: the submodules that are its head. `config`: its input as
    timm describes it, `guessed` the parts of it that nobody said. `notes`: sentences for the user about what was guessed.
    """

    title: str
    features: str | None
    num_classes: int
    num_features: int
    output_width: int
    num_prefix_tokens: int = 0
    classifier: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    guessed: tuple[str, ...] = ()


def guesses_of(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sentences about what was guessed of a model, and the parts of its images' preparation that nobody said; nothing of a model
    that speaks for itself."""
    told = model.description if isinstance(model, AdaptedModel) else None
    return (told.notes, told.guessed) if told is not None else ((), ())


class AdaptedModel(nn.Module):
    """A model `net` of another library behind timm's interface: images [B, C, H, W] to outputs [B, num_classes], or features."""

    def __init__(self, net: nn.Module, description: Description):
        super().__init__()
        self.net, self.description = net, description
        self.num_classes, self.num_features = description.num_classes, description.num_features
        self.head_hidden_size = description.num_features if description.num_classes else description.output_width
        self.num_prefix_tokens = description.num_prefix_tokens
        self.filters: tuple[StateFilter, ...] = ()  # of its library, by which files of weights are tried beside their own names
        self.pretrained_cfg = self.default_cfg = {**description.config, "classifier": description.classifier}

    def forward(self, images: Tensor) -> Tensor:
        return output_of(self.net(images), self.description.title)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's models; see `can_checkpoint`."""
        net: Any = self.net
        if enable:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            net.gradient_checkpointing_disable()


def run_model(model: nn.Module, images: Tensor) -> tuple[Tensor, Any]:
    """The output [B, C] of `model` and its last feature map as it comes, [B, ..., D] or [B, D, H, W]: see `channels_last`.

    The second is None where a model has none, and whatever timm's gives where it is no tensor.
    """
    if isinstance(model, AdaptedModel):
        return _run_adapted(model, images)
    return _run_timm(model, images)


def _run_timm(model: Any, images: Tensor) -> tuple[Tensor, Any]:
    """What a model of timm's gives whoever calls it: a hook, or a `forward` of a user's own, may make another output than its two
    halves do."""
    caught: list[Any] = []
    own, first_half = vars(model).get("forward_features"), model.forward_features

    def caught_features(*args: Any, **kwargs: Any) -> Any:
        caught.append(first_half(*args, **kwargs))
        return caught[-1]

    model.forward_features = caught_features
    try:
        output = model(images)
    finally:
        if own is None:
            del model.forward_features
        else:
            model.forward_features = own
    return output, caught[-1] if caught else None


def _run_adapted(model: AdaptedModel, images: Tensor) -> tuple[Tensor, Tensor | None]:
    path = model.description.features
    if path is None:
        return model(images), None
    caught: list[Tensor | None] = []
    handle = model.net.get_submodule(path).register_forward_hook(lambda module, args, given: caught.append(tensor_in(given)))
    try:
        output = model(images)
    finally:
        handle.remove()
    return output, caught[-1] if caught else None


def output_of(given: Any, title: str) -> Tensor:
    """The output [B, C] in what a model called `title` returned: a tensor, or an output of transformers with one.

    Raises `UserError` that says what came for anything else.
    """
    found = given
    if not isinstance(given, Tensor):
        found = next((t for name in OUTPUTS if isinstance(t := getattr(given, name, None), Tensor)), None)
    if found is None:
        raise UserError(
            f"{title} gives {described_output(given)}; expected a tensor [images, outputs], or logits, image_embeds or "
            "pooler_output as transformers has them"
        )
    if found.dim() != 2:
        raise UserError(f"{title} gives a tensor {list(found.shape)}; expected one output vector an image, [images, outputs]")
    return found


def described_output(given: Any) -> str:
    """What came, for a sentence: a type, and the names or types of its parts."""
    kind = f"a {type(given).__name__}"
    if isinstance(given, dict):  # outputs of transformers are dictionaries too
        return f"{kind} of {', '.join(map(str, list(given)[:5])) or 'nothing'}"
    if isinstance(given, (tuple, list)):
        return f"{kind} of {', '.join(type(part).__name__ for part in given[:5]) or 'nothing'}"
    return kind


def tensor_in(given: Any) -> Tensor | None:
    """The tensor that a submodule gave, or the first of a tuple: layers of transformers return their attention beside it."""
    if isinstance(given, tuple) and given:
        given = given[0]
    return given if isinstance(given, Tensor) else None


def can_checkpoint(model: nn.Module) -> bool:
    """Whether activations can be computed again instead of kept: timm's models mostly, those of transformers that support it."""
    if isinstance(model, AdaptedModel):
        return bool(getattr(model.net, "supports_gradient_checkpointing", False))
    return hasattr(model, "set_grad_checkpointing")


def has_feature_map(model: nn.Module) -> bool:
    """Whether a last feature map can be had; of timm's models only a run tells."""
    return not isinstance(model, AdaptedModel) or model.description.features is not None


def bare(model: nn.Module) -> nn.Module:
    """The model whose tensors have the names that files of weights use."""
    return model.net if isinstance(model, AdaptedModel) else model


def title_of_model(model: nn.Module) -> str:
    """What sentences call a model: the name of its class."""
    return type(bare(model)).__name__


def asks_for_values(error: Exception) -> bool:
    """Whether a run by shapes alone ended with `error` since the model asks for the values of its tensors."""
    return "meta" in str(error) and isinstance(error, (NotImplementedError, RuntimeError))


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model by its shapes alone, in eval mode: no weight is copied, none needs a gradient."""
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in model.parameters()}
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo).eval()
