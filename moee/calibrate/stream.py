"""What the dense model's residual stream holds behind each MLP, as the target of its refit.

A refit to the dense MLP's output on the cut model's own inputs makes good what this layer drops. What earlier layers have lost
stays lost: the stream that the output is added to is off already. So the layer is asked for what brings the stream behind it to
the dense one's, (dense stream - own stream before the MLP) / LayerScale. Of that it learns the part that its activations tell.
The same correction of the targets as in GPTAQ (Li et al. 2025, arXiv 2504.02692), there for quantised weights.

The dense model runs beside the one that is refitted, in passes of the same images that wait at the same layers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import as_tokens
from moee.calibrate.in_step import Pass
from moee.calibrate.layer_sums import Original
from moee.mlps.residual import Reader, residual_readers
from moee.models.ffn import FFN


@dataclass(frozen=True)
class Stream:
    """The `dense` model, if there is one, and by an MLP's name the module that reads what its output is added to."""

    dense: nn.Module | None
    readers: Mapping[str, Reader]

    @classmethod
    def of(cls, dense: nn.Module | None, ffns: Sequence[FFN], image: Tensor) -> Stream:
        """`ffns`: MLPs of `dense`; `image` [1, C, H, W]: what its blocks are looked at with."""
        return cls(dense, {} if dense is None else residual_readers(dense, ffns, image))

    @contextmanager
    def waiting(self, ffns: Sequence[FFN]) -> Iterator[None]:
        """The dense model whose passes wait behind each of the MLPs, whose name is where they are, with the stream there."""
        before: dict[tuple[int, str], Tensor] = {}

        def read(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            before[threading.get_ident(), name] = self.readers[name].tokens(args[0])

        def given(ffn: FFN, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            here = threading.current_thread()
            assert isinstance(here, Pass), "the dense model runs in passes alone"
            stream, added = before.pop((threading.get_ident(), ffn.name)), as_tokens(output, ffn.channels_first)
            here.wait(ffn.name, stream + (added if ffn.scale is None else added * ffn.scale))

        with ExitStack() as stack:
            for ffn in ffns:
                assert self.dense is not None, "readers are of a dense model"
                reader, output = (self.dense.get_submodule(path) for path in (self.readers[ffn.name].path, ffn.output_name))
                stack.callback(reader.register_forward_pre_hook(partial(read, ffn.name)).remove)
                stack.callback(output.register_forward_hook(partial(given, ffn)).remove)
            yield

    @contextmanager
    def noted(self, model: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """The cut `model` whose passes note what the MLPs' outputs are added to."""

        def read(reader: Reader, module: nn.Module, args: tuple[Any, ...]) -> None:
            here = threading.current_thread()
            assert isinstance(here, Pass), "the model runs in passes alone"
            here.beside = reader.tokens(args[0])

        with ExitStack() as stack:
            for name in names:
                reader = self.readers[name]
                stack.callback(model.get_submodule(reader.path).register_forward_pre_hook(partial(read, reader)).remove)
            yield


def target_of(ffn: Original, dense: Tensor, own: Tensor) -> Tensor:
    """What the MLP must give less its bias [tokens, D], so that the stream behind it is the `dense` one [tokens, D]; `own`
    [tokens, D]: what its output is added to. Where the LayerScale is zero nothing comes of it, and it is zero."""
    missing = dense - own
    if ffn.scale is not None:
        missing = torch.where(ffn.scale == 0, 0.0, missing / ffn.scale.masked_fill(ffn.scale == 0, 1.0))
    return missing - ffn.b_down
