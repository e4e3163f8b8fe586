"""Where a model's last feature map is, and which of its tokens are no patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moee.interface.adapted import tensor_in

Shape = tuple[int, int, int]  # of one image: channels, height, width in pixels
MAX_PREFIX = 64  # class tokens and registers


def last_map(observed: Sequence[tuple[str, Tensor]], width: int) -> tuple[tuple[str, Tensor] | None, int, bool]:
    """The last submodule that gave tokens [2, N, D] or a map [2, D, H, W] or [2, H, W, D] of more than one place, the outermost
    of those that gave the same; D; whether it is the last dimension. `observed`: what each gave for two images, in the order in
    which they ended. `width`: D, where the classifier tells."""
    for name, given in reversed(observed):
        if given.dim() not in (3, 4) or given.shape[0] != 2 or not given.is_floating_point():
            continue
        sides = given.shape[1:]
        if given.dim() == 3:
            first = width == sides[0] != sides[1]
        elif width in (sides[0], sides[2]) and sides[0] != sides[2]:
            first = width == sides[0]
        else:  # of a square map the odd one out is D
            first = sides[1] == sides[2] != sides[0] or (not sides[0] == sides[1] != sides[2] and sides[0] >= sides[2])
        dim = sides[0] if first else sides[-1]
        if dim > 1 and given[0].numel() > dim:
            return (name, given), dim, not first
    return None, 0, True


def prefix_tokens(module: nn.Module, shape: Shape, features: tuple[str, Tensor] | None, channels_last: bool) -> int:
    """How many of the tokens are no patches: class tokens and registers."""
    if features is None or features[1].dim() != 3 or not channels_last:
        return 0
    patches = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    if patches is None or patches.kernel_size != patches.stride:
        return 0
    rows, columns = (side // step for side, step in zip(shape[1:], patches.stride, strict=True))
    extra = features[1].shape[1] - rows * columns
    return extra if 0 <= extra <= MAX_PREFIX else 0


class _Seen(Exception):
    """Ends a run whose rest is not needed."""


def prefix_comes_first(module: nn.Module, shape: Shape, tokens: int, prefix: int) -> bool:
    """Whether of the `tokens` that a part reads or gives exactly the first `prefix` are alike for two images, as class tokens
    and registers are before attention mixes them. True of a module without memory, which nothing can be seen of."""
    like = next(module.parameters(), None)
    if like is None or like.is_meta:
        return True
    alike: list[bool] = []

    def see(part: nn.Module, args: Any, output: Any = None) -> None:
        given = tensor_in(args if output is None else output)
        if given is not None and given.dim() == 3 and given.shape[:2] == (2, tokens):
            alike.extend((given[0] == given[1]).all(-1).tolist())
            raise _Seen

    with torch.device("cpu"):  # whatever the default device is: shapes are asked for under meta
        images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(like.device)
    parts = [part for name, part in module.named_modules() if name]
    handles = [part.register_forward_pre_hook(see) for part in parts] + [part.register_forward_hook(see) for part in parts]
    try:
        with torch.no_grad(), torch.device("cpu"):
            module(images)
    except Exception:  # `_Seen`, or any code's own: what was not seen is not so
        pass
    finally:
        for handle in handles:
            handle.remove()
    return alike == [at < prefix for at in range(tokens)]
