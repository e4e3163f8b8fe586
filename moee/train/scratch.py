"""The aliases `vit-scratch`, `swin-scratch` and `convnext-scratch`: small models trained here, from nothing, on scikit-learn's
digits.

What they are for: ablations and tables whose cells take seconds, on classifiers with heads of their own and real labels. The
weights are trained once, with a fixed seed, and kept in the cache folder; the file's name carries a hash of the recipe.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from moee.data.image_set import ImageSet, batches
from moee.data.sources import load_data
from moee.data.transform import model_transform
from moee.models.model import ModelSpec, build_model
from moee.progress import Reporter, silent
from moee.store.artifact import sha256_file
from moee.store.cache import cache_dir, cache_lock, tensor_hash
from moee.store.tensor_file import write_tensors

NAME, DATA = "vit-scratch", "digits"
TIMM_NAME = "vit_tiny_patch16_224"
SIDE = 32  # pixels


class Arguments(BaseModel):
    """timm's, of one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Vit(Arguments):
    """timm's arguments of the small ViT."""

    img_size: int = SIDE
    patch_size: int = 4
    embed_dim: int = 96
    depth: int = 6
    num_heads: int = 3
    num_classes: int = 10


class Swin(Arguments):
    """timm's arguments of the small Swin: 16 tokens, then 4."""

    img_size: int = SIDE
    patch_size: int = 8
    embed_dim: int = 48
    depths: tuple[int, ...] = (2, 4)
    num_heads: tuple[int, ...] = (2, 4)
    window_size: int = 2
    num_classes: int = 10


class ConvNext(Arguments):
    """timm's arguments of the small ConvNeXt: 64, 16, 4 and 1 pixels. Trained for minutes, a LayerScale of 1e-6 would leave
    its blocks without effect."""

    patch_size: int = 2
    dims: tuple[int, ...] = (32, 64, 96, 128)
    depths: tuple[int, ...] = (1, 2, 2, 1)
    ls_init_value: float = 0.1
    num_classes: int = 10


class Training(BaseModel):
    """How they are trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = 0
    epochs: int = 60
    warmup_epochs: int = 4
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    rotate_degrees: float = 10.0
    shift: float = 0.08  # of the image's width
    scale: float = 0.1

    name: ClassVar[str]
    timm_name: ClassVar[str]
    said: ClassVar[str]  # in sentences
    input_size: ClassVar[tuple[int, int] | None] = None  # of a model that takes any

    def model_kwargs(self) -> dict[str, Any]:
        """What timm's `create_model` takes."""
        return self.model_dump(mode="json", exclude=set(Training.model_fields))

    def spec(self) -> ModelSpec:
        """The model without its weights."""
        return ModelSpec(name=self.name, timm_name=self.timm_name, kwargs=self.model_kwargs(), input_size=self.input_size)


class ScratchRecipe(Training, Vit):
    """Architecture and training of the small ViT. Everything that decides its weights, in the order that its file is named by."""

    name, timm_name, said = NAME, TIMM_NAME, "A ViT of six blocks and 96 channels"


class SwinRecipe(Training, Swin):
    """Architecture and training of the small Swin."""

    name, timm_name, said = "swin-scratch", "swin_tiny_patch4_window7_224", "A Swin of six blocks, 48 and 96 channels"
    epochs: int = 25


class ConvNextRecipe(Training, ConvNext):
    """Architecture and training of the small ConvNeXt."""

    name, timm_name, said = "convnext-scratch", "convnext_tiny", "A ConvNeXt of six blocks, 32 to 128 channels"
    input_size = (SIDE, SIDE)
    epochs: int = 15


SCRATCH: dict[str, Training] = {recipe.name: recipe for recipe in (ScratchRecipe(), SwinRecipe(), ConvNextRecipe())}


def scratch_spec(recipe: Training | None = None, report: Reporter = silent) -> ModelSpec:
    """The `ModelSpec` of a small model, the ViT by default; trains it on first use (minutes on two cores)."""
    recipe = recipe or ScratchRecipe()
    path = cache_dir() / f"{recipe.name}-{tensor_hash(extra=recipe.model_dump_json())[:12]}.safetensors"
    if not path.is_file():
        with cache_lock(path.stem, report):
            if not path.is_file():
                state = train(recipe, report=report)
                write_tensors(state, path, metadata={"recipe": recipe.model_dump_json(), "data": DATA})
    return recipe.spec().model_copy(update={"weights": str(path), "weights_sha256": sha256_file(path)})


def train(recipe: Training, data: ImageSet | None = None, report: Reporter = silent) -> dict[str, Tensor]:
    """Train from random weights on `data` (default: the digits' training images); returns the state dict.

    AdamW with warm-up and cosine annealing on randomly rotated, shifted and scaled images. The same recipe, data and thread
    count give the same weights; the caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_model(recipe.spec()).train()
        data = data or load_data(DATA, model_transform(model), "train")
        steps = recipe.epochs * math.ceil(len(data) / recipe.batch_size)
        warmup = recipe.warmup_epochs * math.ceil(len(data) / recipe.batch_size)
        optimizer = torch.optim.AdamW(_decay_groups(model, recipe.weight_decay), lr=recipe.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, warmup, steps))
        report(f"train {recipe.name}", 0, recipe.epochs)
        for epoch in range(recipe.epochs):
            for batch in batches(data, recipe.batch_size, order=torch.randperm(len(data))):
                loss = nn.functional.cross_entropy(model(_jitter(batch.images, recipe)), batch.labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            report(f"train {recipe.name}", epoch + 1, recipe.epochs)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _lr_factor(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, the class token and positions do not."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and n not in ("cls_token", "pos_embed")]
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _jitter(images: Tensor, recipe: Training) -> Tensor:
    """Each image [B, 3, H, W] rotated, scaled and shifted at random; what enters from outside is the border's value."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * math.radians(recipe.rotate_degrees)
    zoom = 1 + (torch.rand(count) * 2 - 1) * recipe.scale
    shift = (torch.rand(count, 2) * 2 - 1) * 2 * recipe.shift  # the grid spans -1..1
    theta = torch.stack([
        torch.stack([zoom * angle.cos(), -zoom * angle.sin(), shift[:, 0]], 1),
        torch.stack([zoom * angle.sin(), zoom * angle.cos(), shift[:, 1]], 1),
    ], 1)  # fmt: skip
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
