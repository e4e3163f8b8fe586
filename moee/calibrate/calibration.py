"""Calibration: one pass over the data that keeps a uniform sample of every MLP's input tokens on disk.

Only inputs [N, D] are kept (float16); hidden activations are recomputed from them, which costs one matrix product and
saves four fifths of the disk. Peak memory is one batch's forward pass.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from moee.cures import cures
from moee.data.image_set import ImageSet, batches, merge_skipped
from moee.errors import UserError
from moee.interface.watch import watched
from moee.models.ffn import FFN
from moee.parallel.group import SOLO, Group, Parcel
from moee.parallel.machine import in_half
from moee.progress import Reporter, silent, track
from moee.space.limits import USUAL, Limits

CHUNK = 8192  # tokens a matrix product


class TokenSite(Protocol):
    """Where tokens are taken: a dense MLP, or a layer in its place."""

    @property
    def name(self) -> str:
        """Path of the module."""

    @property
    def dim(self) -> int:
        """Width of its tokens."""

    @property
    def channels_first(self) -> bool:
        """Whether its input is [B, D, H, W]."""


@dataclass(frozen=True)
class LayerTokens:
    """A layer's sampled input tokens: a float16 memory map [N, D] and the first `count` rows that are filled."""

    name: str
    path: Path
    count: int
    dim: int

    def load(self, rows: Tensor | None = None) -> Tensor:
        """Tokens as float32 [n, D]; all of them, or the given rows."""
        if not self.count:
            return torch.zeros(0, self.dim)
        data = np.memmap(self.path, np.float16, "r", shape=(self.count, self.dim))
        return torch.from_numpy(np.asarray(data if rows is None else data[rows.numpy()], dtype=np.float32))


def hidden_activations(ffn: FFN, tokens: Tensor) -> Tensor:
    """Activations [n, H] behind the first linear map, for input tokens [n, D]."""
    return ffn.activations(tokens)


def as_tokens(x: Tensor, channels_first: bool) -> Tensor:
    """[B, N, D], [B, H, W, D] or (channels first) [B, D, H, W] to [tokens, D] in reading order."""
    if channels_first:
        x = x.movedim(1, -1)
    return x.reshape(-1, x.shape[-1])


def reserve(path: Path, size_bytes: int) -> None:
    """Make a file of this size whose space on the disk is taken at once.

    Raises `OSError` on a full disk.
    """
    with open(path, "wb") as file:
        if size_bytes and hasattr(os, "posix_fallocate"):  # macOS lacks it
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        else:
            file.truncate(size_bytes)


class _Sampler:
    """Writes the sampled tokens of one layer; the sample is drawn when the first batch shows the tokens an image."""

    def __init__(
        self, ffn: TokenSite, folder: Path, budget: int, images: int, seed: int, *, drawn: dict[int, Tensor], part: range,
        files: ExitStack,
    ):  # fmt: skip
        self.ffn, self.budget, self.images, self.seed, self.drawn, self.part = ffn, budget, images, seed, drawn, part
        self.files = files
        self.path = folder / f"{ffn.name}.f16"
        self.filled = 0
        self.chosen: Tensor | None = None
        self.file: BinaryIO | None = None
        self.per_image = 0

    def _draw(self, per_image: int) -> Tensor:
        """Sorted flat positions image * per_image + token: a uniform sample without replacement, drawn once for all layers of
        as many tokens. It depends on the whole data set alone, so that ranks that see a part of it draw the same."""
        total = per_image * self.images
        if total <= self.budget:
            return torch.arange(total)
        if total not in self.drawn:
            generator = torch.Generator().manual_seed(self.seed)
            # a copy: a slice would hold all of the permutation, 8 bytes a token of the data set
            self.drawn[total] = torch.randperm(total, generator=generator)[: self.budget].clone().sort().values
        return self.drawn[total]

    def _reserve(self, size_bytes: int) -> None:
        """Take the space of the sample. Raises `UserError` where the disk lacks it."""
        try:
            reserve(self.path, size_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{os.strerror(error.errno)}: the tokens of `{self.ffn.name}` take {max(1, -(-size_bytes >> 20))} MiB in "
                f"{self.path.parent}, beside those of the other layers; give "
                f"{cures('a larger disk with --scratch DIR', 'fewer --tokens', elsewhere='a larger disk with TMPDIR=DIR')}"
            ) from error

    def add(self, x: Tensor, indices: Tensor) -> None:
        tokens = as_tokens(x, self.ffn.channels_first)
        if self.chosen is None or self.file is None:
            self.per_image = len(tokens) // len(indices)
            self.chosen = self._draw(self.per_image)
            ends = torch.tensor([self.part.start, self.part.stop]) * self.per_image
            # what falls on this rank's images; an empty file cannot be mapped
            self._reserve(2 * max(1, int(torch.searchsorted(self.chosen, ends).diff())) * self.ffn.dim)
            self.file = self.files.enter_context(open(self.path, "r+b"))  # written, not mapped: pages would stay in memory
        starts = indices * self.per_image
        low = torch.searchsorted(self.chosen, starts)
        high = torch.searchsorted(self.chosen, starts + self.per_image)
        rows = [
            self.chosen[a:b] - s + position * self.per_image
            for position, (s, a, b) in enumerate(zip(starts.tolist(), low.tolist(), high.tolist(), strict=True))
        ]
        picked = tokens[torch.cat(rows)].cpu()
        if not torch.isfinite(picked).all():
            raise UserError(
                f"`{self.ffn.name}` receives NaN or infinite activations on the calibration data; "
                "check the weights and the input normalisation"
            )
        half = in_half(picked.clamp(-65504, 65504)).numpy()
        self.file.write(half.tobytes())
        self.filled += len(half)


def collect_tokens(
    model: nn.Module, ffns: Sequence[TokenSite], data: ImageSet, folder: Path, budget: int, *, seed: int = 0,
    report: Reporter = silent, group: Group = SOLO, limits: Limits = USUAL,
) -> list[LayerTokens]:  # fmt: skip
    """Sample at most `budget` input tokens of each MLP, uniformly over images and positions, in one pass over `data`.

    Files go to `folder`, one a layer. Same model, data and seed give the same bytes. In a `group` the ranks share the images and
    each keeps its own part of the sample: `gather_tokens` puts a layer's parts together. Raises `UserError` that names the
    layer for NaN or infinite activations.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[int, Tensor] = {}
    part = group.part(len(data), limits.forward)
    files = ExitStack()
    samplers = [_Sampler(ffn, folder, budget, len(data), seed, drawn=drawn, part=part, files=files) for ffn in ffns]
    by_name = {sampler.ffn.name: sampler for sampler in samplers}
    indices = torch.empty(0)  # of the batch that runs

    def sample(name: str, x: Tensor) -> None:
        by_name[name].add(x.detach(), indices)

    with files, watched(model, by_name, sample), group.agreed(), group.placed(model), torch.inference_mode():
        shared = batches(data, limits.forward, order=torch.arange(part.start, part.stop), strict=group.alone)
        for batch in track(shared, "calibrate", -(-len(part) // limits.forward), report):
            indices = batch.indices
            model(batch.images.to(group.device))
    if not group.alone:
        merge_skipped(data, group)
    return [LayerTokens(s.ffn.name, s.path, s.filled, s.ffn.dim) for s in samplers]


def gather_tokens(sampled: Sequence[LayerTokens], group: Group) -> list[LayerTokens | None]:
    """Bring each layer's parts together on the rank that will work on it, layer i on rank i mod the world size; None for the
    other ranks' layers. Parts lie in rank order, which is the order of the images: the bytes are those of one rank alone.
    """
    whole: list[LayerTokens | None] = []
    for position, part in enumerate(sampled):
        owner = position % group.world
        if group.rank != owner:
            rows = np.memmap(part.path, np.float16, "r", shape=(part.count, part.dim)) if part.count else np.zeros((0, part.dim))
            group.send(Parcel(None, {"tokens": torch.from_numpy(np.array(rows, dtype=np.float16))}), owner)
            part.path.unlink(missing_ok=True)
            whole.append(None)
            continue
        path, count = part.path.with_suffix(".whole"), 0
        with open(path, "wb") as out:
            for rank in range(group.world):
                if rank == group.rank:
                    out.write(part.path.read_bytes()[: part.count * part.dim * 2] if part.count else b"")
                    count += part.count
                else:
                    tokens = group.receive(rank).tensors["tokens"]
                    out.write(tokens.numpy().tobytes())
                    count += len(tokens)
        part.path.unlink(missing_ok=True)
        whole.append(LayerTokens(part.name, path, count, part.dim))
    return whole
