"""One optimiser step of the distillation: its batch divided over ranks and, one after another, into parts.

The step's loss is the mean over the whole batch however it is divided, so neither the number of ranks nor `accumulate` changes a
run beyond float noise. Gradients are averaged by torch's DistributedDataParallel, each part weighted by its images.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moee.config import FinetuneConfig
from moee.data.image_set import Batch, ImageSet, listed_batches
from moee.errors import UserError, chosen
from moee.interface.adapted import run_model
from moee.models.ffn import channels_last
from moee.parallel.group import Group

AMP: dict[str, torch.dtype | None] = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def distillation_loss(student: Tensor, teacher: Tensor, classifier: bool, temperature: float = 1.0) -> Tensor:
    """Scalar loss of outputs [B, C]: KL(teacher || student) for logits, relative error plus 1 - cosine for features. A classifier
    of one output gives the logit of a yes, whose softmax alone would always be 1."""
    if classifier and student.shape[1] == 1:
        student, teacher = (torch.cat([torch.zeros_like(logit), logit], 1) for logit in (student, teacher))
    if classifier:
        log_student = torch.log_softmax(student / temperature, -1)
        soft = torch.softmax(teacher / temperature, -1)
        return nn.functional.kl_div(log_student, soft, reduction="batchmean") * temperature**2
    relative = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
    return (relative + 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)).mean()


def token_power(teacher: Tensor) -> Tensor:
    """Mean squared norm of the tokens of a feature map [B, ..., D]."""
    return teacher.square().sum(-1).mean()


def token_loss(student: Tensor, teacher: Tensor, power: Tensor | None = None) -> Tensor:
    """Scalar loss of feature maps [B, ..., D]: squared error over the teacher's mean power, plus one minus the tokens' cosine.

    `power` is that of the whole batch where these are a part of it.
    """
    power = token_power(teacher) if power is None else power
    relative = (student - teacher).square().sum(-1).mean() / power.clamp(min=1e-12)
    return relative + 1 - nn.functional.cosine_similarity(student, teacher, dim=-1).mean()


@dataclass(frozen=True)
class Wanted:
    """The dense model's output [B, C] and, for distillation of tokens, its last feature map [B, ..., D]."""

    output: Tensor
    tokens: Tensor | None = None


class _Student(nn.Module):
    """The model under one forward call, which DistributedDataParallel can wrap: output, and the last feature map if wanted."""

    def __init__(self, model: nn.Module, features: bool):
        super().__init__()
        self.model, self.features = model, features

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if not self.features:
            return (self.model(images),)
        output, features = run_model(self.model, images)
        return output, channels_last(features, self.model)


class Trainer:
    """Loss and gradients of `model` against `dense`, whose outputs on the data set are `teacher` [N, C] (unused with tokens).

    Both models must be on the group's device. With `checkpointing` the model is left with its activation checkpointing off.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, teacher: Tensor, config: FinetuneConfig, group: Group):
        self.model, self.dense, self.teacher, self.config, self.group = model, dense, teacher, config, group
        self.classifier = bool(getattr(model, "num_classes", 0))
        self.tokens = config.distil == "tokens"
        self.student: nn.Module = _Student(model, self.tokens)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=config.amp == "fp16")
        if config.checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        if not group.alone:
            # find_unused_parameters: a backbone's class head, for one, has no gradient. It also keeps the buckets as they are
            # made first, so that a resumed run adds the gradients up in the same order.
            devices = None if group.device.type == "cpu" else [group.device.index]
            # buffers never change; newer versions of torch have another name for the same switch
            known = inspect.signature(DistributedDataParallel.__init__).parameters
            more: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
            more |= {"device_ids": devices, "process_group": group.ranks}
            self.student = DistributedDataParallel(self.student, find_unused_parameters=True, **more)

    def close(self) -> None:
        if self.config.checkpointing:
            self.model.set_grad_checkpointing(False)  # type: ignore[operator]

    def steps(self, data: ImageSet, order: Tensor, size: int | None = None) -> Iterator[tuple[int, list[Batch]]]:
        """For every batch of `order`, of `size` images or the usual number: how many it has, and this rank's images in at most
        `accumulate` parts."""
        whole = order.split(size or self.config.batch_size)
        plan = [self._parts(batch) for batch in whole]
        loaded = listed_batches(data, [part.tolist() for parts in plan for part in parts], strict=False)
        for batch, parts in zip(whole, plan, strict=True):
            images_made = [next(loaded, None) for _ in parts]
            yield len(batch), [self._whole(data, made, part) for made, part in zip(images_made, parts, strict=True)]

    @staticmethod
    def _whole(data: ImageSet, made: Batch | None, part: Tensor) -> Batch:
        if made is None or len(made.images) != len(part):
            raise UserError(f"an image of {data.name} that could be read before cannot be read any more; run the command again")
        return made

    def _parts(self, batch: Tensor) -> Sequence[Tensor]:
        share = self.group.part(len(batch))
        if not share:  # a last batch smaller than the group: the rank goes along with a weight of zero
            return (batch[:1],)
        return batch[share.start : share.stop].chunk(self.config.accumulate)

    def backward(self, images: int, parts: list[Batch]) -> float:
        """Add the gradients of a batch of `images`, of which `parts` are this rank's, to the parameters; returns the loss
        summed over the images of all ranks."""
        has_share = len(self.group.part(images)) > 0
        wanted = [self._wanted(part) for part in parts]
        power = self._power(images, parts, wanted) if has_share or not self.group.alone else None
        total = torch.zeros(1, dtype=torch.float64)
        for position, part in enumerate(parts):
            last = position == len(parts) - 1
            count = len(part.images) if has_share else 0
            with nullcontext() if last else self._apart():
                loss = self._loss(self.student, part, wanted[position], power)
                # DistributedDataParallel divides by the number of ranks
                self.scaler.scale(loss * (count * self.group.world / images)).backward()
            total += float(loss.detach()) * count if count else 0.0
        return float(self.group.sum(total))

    def measure(self, data: ImageSet, order: Tensor) -> float:
        """Mean loss over the images of `order`, in float32; batches are divided over the ranks as they are."""
        share = self.group.part(len(order), self.config.batch_size)
        losses = []
        with torch.no_grad():
            parts = [part.tolist() for part in order[share.start : share.stop].split(self.config.batch_size) if len(part)]
            for batch in listed_batches(data, parts, strict=False):
                loss = self._loss(self.plain, batch, self._wanted(batch), None, amp=False)
                losses.append(float(loss) * len(batch.images))
        return sum(value for rank in self.group.all_json(losses) for value in rank) / len(order)

    @property
    def plain(self) -> nn.Module:
        """The student without its wrapper."""
        return self.student.module if isinstance(self.student, DistributedDataParallel) else self.student

    def _apart(self) -> AbstractContextManager:
        return self.student.no_sync() if isinstance(self.student, DistributedDataParallel) else nullcontext()

    def _wanted(self, part: Batch) -> Wanted:
        """What the student is to match; with tokens the dense model runs for it, its feature map would be too large to keep."""
        if not self.tokens:
            return Wanted(self.teacher[part.indices].to(self.group.device))
        with torch.no_grad():
            output, features = run_model(self.dense, part.images.to(self.group.device))
        return Wanted(output, channels_last(features, self.dense))

    def _power(self, images: int, parts: list[Batch], wanted: list[Wanted]) -> Tensor | None:
        """Mean power of the whole batch's teacher tokens; None where one part is the whole batch."""
        if not self.tokens or (self.group.alone and len(parts) == 1):
            return None
        weights = [len(part.images) if self.group.part(images) else 0 for part in parts]
        maps = [w.tokens for w in wanted if w.tokens is not None]
        power = sum(float(token_power(tokens)) * n for tokens, n in zip(maps, weights, strict=True)) / images
        return self.group.sum(torch.tensor([power], dtype=torch.float64)).float()[0].to(self.group.device)

    def _loss(self, student: nn.Module, part: Batch, wanted: Wanted, power: Tensor | None, amp: bool = True) -> Tensor:
        """Mean loss of some images, in float32 whatever the student computes in."""
        device = self.group.device
        dtype = chosen(AMP, self.config.amp, "amp") if amp else None
        with torch.autocast(device.type, dtype) if dtype is not None else nullcontext():
            output, *features = student(part.images.to(device))
        loss = distillation_loss(output.float(), wanted.output, self.classifier, self.config.temperature)
        return loss if wanted.tokens is None else loss + token_loss(features[0].float(), wanted.tokens, power)
