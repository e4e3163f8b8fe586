"""The cases of the pack: a layer of dinov2-s's sizes, one of DeiT-B's, tokens of a model's own, and the synthetic ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from plugins.contract import ACTIVATIONS, INPUT_NAMES
from plugins.library.cases import LayerCase, write_cases
from tests.gpu.whole_model import CASES, Case, plain_model, routed


def write_pack_cases(folder: Path) -> None:
    """Write `cases.bin`, with layers of random weights and routers of the tokens' own clusters, and `small.bin` without them, for
    what takes long: a sanitizer, and the double of the driver."""
    write_cases(folder / "cases.bin", [layer_case(replace(case, arguments=(("depth", 2),))) for case in CASES])
    write_cases(folder / "small.bin")


@torch.no_grad()
def layer_case(case: Case) -> LayerCase:
    """The second block's layer of a model, on one image of noise."""
    torch.manual_seed(0)
    dense = plain_model(case)
    images = torch.randn(1, 3, case.size, case.size)
    layer = routed(dense, images).blocks[1].mlp  # type: ignore[union-attr]
    found: list[Tensor] = []
    dense.blocks[1].mlp.register_forward_pre_hook(lambda _, given: found.append(given[0]))  # type: ignore[union-attr]
    dense(images)
    tokens = found[0].flatten(0, 1)
    inputs = {"x": tokens, **{key: getattr(layer, key).detach() for key in INPUT_NAMES[1:]}}
    return LayerCase(
        name=case.name, inputs=inputs, activation=ACTIVATIONS.index(layer.activation), timed=("float16",), per_image=len(tokens),
        dense_width=dense.blocks[1].mlp.fc1.out_features, is_layer=True,  # type: ignore[union-attr]
    )  # fmt: skip
