"""What the dense model's residual stream holds behind each MLP, as the target of its refit.

A refit to the dense MLP's output on the cut model's own inputs makes good what this layer drops. What earlier layers have lost
stays lost: the stream that the output is added to is off already. So the layer is asked for what brings the stream behind it to
the dense one's, (dense stream - own stream before the MLP) / LayerScale. Of that it learns the part that its activations tell.
The same correction of the targets as in GPTAQ (Li et al. 2025, arXiv 2504.02692), there for quantised weights.

The dense model runs beside the one that is refitted, in passes of the same images that wait at the same layers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import as_tokens
from moee.calibrate.in_step import Pass
from moee.mlps.residual import AttentionSite, Reader, attention_sites, residual_readers
from moee.models.ffn import FFN


@dataclass(frozen=True)
class Stream:
    """The `dense` model, if there is one, and by an MLP's name the module that reads what its output is added to, and the
    attention before it, if that is refitted too."""

    dense: nn.Module | None
    readers: Mapping[str, Reader]
    attentions: Mapping[str, AttentionSite]

    @classmethod
    def of(cls, dense: nn.Module | None, ffns: Sequence[FFN], attentions: Iterable[str], image: Tensor) -> Stream:
        """`ffns`: MLPs of `dense`; `attentions`: those to be refitted; `image` [1, C, H, W]: what its blocks are looked at
        with."""
        if dense is None:
            return cls(None, {}, {})
        readers = residual_readers(dense, ffns, image)
        return cls(dense, readers, attention_sites(dense, readers, attentions, image))

    @contextmanager
    def waiting(self, ffns: Sequence[FFN]) -> Iterator[None]:
        """The dense model whose passes wait with the stream behind each of the MLPs, and behind an attention that is refitted;
        where they are is the name of the one or the other."""
        before: dict[tuple[int, str], Tensor] = {}

        def read(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            before[threading.get_ident(), name] = stream = self.readers[name].tokens(args[0])
            if name in self.attentions:
                _here().wait(self.attentions[name].name, stream)

        def given(ffn: FFN, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            stream, added = before.pop((threading.get_ident(), ffn.name)), as_tokens(output, ffn.channels_first)
            _here().wait(ffn.name, stream + (added if ffn.scale is None else added * ffn.scale))

        with ExitStack() as stack:
            for ffn in ffns:
                assert self.dense is not None, "readers are of a dense model"
                reader, output = (self.dense.get_submodule(path) for path in (self.readers[ffn.name].path, ffn.output_name))
                stack.callback(reader.register_forward_pre_hook(partial(read, ffn.name)).remove)
                stack.callback(output.register_forward_hook(partial(given, ffn)).remove)
            yield

    @contextmanager
    def noted(self, model: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """The cut `model` whose passes note what the outputs of the MLPs, and of the attentions, are added to."""

        def read(reader: Reader, module: nn.Module, args: tuple[Any, ...]) -> None:
            _here().beside = reader.tokens(args[0])

        with ExitStack() as stack:
            for name in names:
                own = [self.attentions[name].reader] if name in self.attentions else []
                for reader in (*own, self.readers[name]):
                    stack.callback(model.get_submodule(reader.path).register_forward_pre_hook(partial(read, reader)).remove)
            yield


def _here() -> Pass:
    """The pass that runs."""
    here = threading.current_thread()
    assert isinstance(here, Pass), "the models run in passes alone"
    return here


def target_of(dense: Tensor, own: Tensor, scale: Tensor | None) -> Tensor:
    """What must come to the stream `own` [tokens, D] through the LayerScale `scale` [D], so that it is the `dense` one. Where the
    LayerScale is zero nothing comes through, and it is zero."""
    missing = dense - own
    return missing if scale is None else torch.where(scale == 0, 0.0, missing / scale.masked_fill(scale == 0, 1.0))
