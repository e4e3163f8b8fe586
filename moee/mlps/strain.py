"""Whether an MLP is what its parts say beyond the inputs that images give it.

A clamp that no image reaches shows in no output, and would be cut away in silence. So the model is run once more, with each MLP's
input `STRAIN` times as large; the rest of the model gets what it would get without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moee.errors import UserError
from moee.mlps.proof import STRAIN, disagreement, strained_obstacle
from moee.models.ffn import FFN
from moee.schema import reason_of


@torch.no_grad()
def strained(model: nn.Module, ffns: Mapping[str, FFN], images: Tensor) -> dict[str, str]:
    """What speaks against those of the MLPs `ffns`, by name, which gave what their formulas say on `images` [B, C, H, W]. One
    forward pass on the first image."""
    found: dict[str, str] = {}
    inside: dict[str, Tensor] = {}  # what the MLPs that are running were to read

    def before(name: str) -> Any:
        def see(module: nn.Module, args: tuple) -> tuple[Tensor]:
            inside[name] = args[0]
            return (args[0] * STRAIN,)

        return see

    def after(name: str) -> Any:
        def see(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x, ffn = inside.pop(name), ffns[name]
            if not disagreement(ffn, x * STRAIN, output) <= 1:
                found[name] = strained_obstacle(ffn)
            return _formula(ffn, x)

        return see

    handles = []
    for name, ffn in ffns.items():
        handles.append(model.get_submodule(name).register_forward_pre_hook(before(name)))
        handles.append(model.get_submodule(ffn.output_name).register_forward_hook(after(name)))
    try:
        model(images[:1])
    except (UserError, MemoryError):
        raise
    except Exception as error:  # any code may stand behind a model; it has run on smaller inputs
        reason = f"does not run on inputs {STRAIN:g} times as large: {reason_of(error)}"
        found |= {name: reason for name in inside}
    finally:
        for handle in handles:
            handle.remove()
    if inside:  # those after it have not run
        return found | strained(model, {name: ffn for name, ffn in ffns.items() if name not in found}, images)
    return found


def _formula(ffn: FFN, x: Tensor) -> Tensor:
    """What an MLP gives for its input x, by its weights."""
    tokens = x.movedim(1, -1) if ffn.channels_first else x
    output = ffn.proof(tokens.reshape(-1, ffn.dim).float())[0].reshape(tokens.shape).to(x.dtype)
    return output.movedim(-1, 1) if ffn.channels_first else output
