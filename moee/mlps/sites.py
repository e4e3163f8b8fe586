"""Where an MLP sits in a model: one module, or an up map, an activation and a down map that lie in different places.

A routed layer takes the place of the module, or of the up map; then the activation and the down map pass their input on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moee.errors import UserError
from moee.layers.routed import RoutedLayer
from moee.models.ffn import FFN
from moee.models.model import replace_module
from moee.schema import reason_of

CLOSE = 1e-3  # of an output's root mean square: the trial runs the same modules in another order


class SplitMLP(nn.Module):
    """An MLP whose three parts lie apart in their model, as one module: tokens [..., D], or a map [B, D, H, W], to the same."""

    def __init__(self, up: nn.Module, act: nn.Module, down: nn.Module):
        super().__init__()
        self.up, self.act, self.down = up, act, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def mlp_module(model: nn.Module, name: str, bypassed: Sequence[str] = ()) -> nn.Module:
    """The MLP `name` of a dense model as one module; `bypassed` are the paths of its activation and its down map where it is
    split (see `FFN.bypassed`)."""
    parts = [model.get_submodule(path) for path in (name, *bypassed)]
    return SplitMLP(*parts) if bypassed else parts[0]


def put_mlp(model: nn.Module, name: str, new: nn.Module, bypassed: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Put `new` in the place of the MLP `name`, and nothing where its `bypassed` parts are. A routed layer remembers them.
    Returns what was there by path, for `restore_mlp`."""
    originals = {path: model.get_submodule(path) for path in (name, *bypassed)}
    for path in bypassed:
        replace_module(model, path, nn.Identity())
    replace_module(model, name, new)
    if isinstance(new, RoutedLayer):
        new.bypassed = tuple(bypassed)
    return originals


def restore_mlp(model: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Put back what `put_mlp` took out."""
    for path, module in originals.items():
        if model.get_submodule(path) is not module:
            replace_module(model, path, module)


@contextmanager
def mlp_replaced(model: nn.Module, name: str, new: nn.Module, bypassed: Sequence[str] = ()) -> Iterator[None]:
    """The model with `new` in the place of an MLP, for a while."""
    originals = put_mlp(model, name, new, bypassed)
    try:
        yield
    finally:
        restore_mlp(model, originals)


@torch.no_grad()
def inseparable(model: nn.Module, ffns: Sequence[FFN], images: Tensor | None, output: Any) -> dict[str, str]:
    """The split MLPs that something else in the model needs parts of, with the reason: it reads a weight, or the hidden layer.

    Each MLP is put into the place of its up map as a whole, and the model run again on `images`; its `output` must stay. Without
    memory only what cannot run is found. The model stays as it is.
    """
    if not ffns or images is None:
        return {}
    if not _trouble(model, ffns, images, output):
        return {}
    found = {ffn.name: reason for ffn in ffns if (reason := _trouble(model, [ffn], images, output))}
    rest = [ffn for ffn in ffns if ffn.name not in found]
    if rest and (reason := _trouble(model, rest, images, output)):
        found |= {ffn.name: reason for ffn in rest}
    return found


def _trouble(model: nn.Module, ffns: Sequence[FFN], images: Tensor, output: Any) -> str:
    """What goes wrong in the model with these MLPs as modules of their own ("": nothing)."""
    with ExitStack() as stack:
        for ffn in ffns:
            whole = mlp_module(model, ffn.name, ffn.bypassed)
            stack.enter_context(mlp_replaced(model, ffn.name, whole, ffn.bypassed))
        try:
            given = model(images)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # any code may stand behind a model
            return f"something else in the model uses its parts: {reason_of(error)}"
    before, after = list(_tensors(output)), list(_tensors(given))
    alike = len(before) == len(after) and all(_alike(a, b) for a, b in zip(before, after, strict=True))
    return "" if alike else "something else in the model reads its hidden layer"


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.is_meta or not a.is_floating_point():
        return a.shape == b.shape
    size = float(a.float().square().mean().sqrt())
    return torch.allclose(b.float(), a.float(), rtol=0, atol=CLOSE * size)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
