"""A timm model and an image folder so small that a command on them takes a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import _cfg, _create_vision_transformer

NAME = "vit_reliability"
SIZE, CLASSES = 32, 3
default_cfgs = generate_default_cfgs(
    {f"{NAME}.none": _cfg(input_size=(3, SIZE, SIZE), num_classes=0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))}
)


@register_model
def vit_reliability(pretrained: bool = False, **kwargs):
    """Two blocks of width 32 on 4 x 4 patches; a backbone, so that a probe is fitted."""
    arguments = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0, **kwargs}
    return _create_vision_transformer(NAME, pretrained=pretrained, **arguments)


def write_images(root: Path, train: int = 10, val: int = 5, seed: int = 0) -> None:
    """`root/{train,val}/class{c}/{i}.png`: noise around a pattern a class."""
    noise = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            pattern = np.random.default_rng(label).integers(0, 256, (8, 8, 3))
            for i in range(count):
                pixels = np.kron(pattern, np.ones((4, 4, 1))) + noise.normal(0, 20, (SIZE, SIZE, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")


def write_weights(path: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    save_file(timm.create_model(NAME).state_dict(), path)
