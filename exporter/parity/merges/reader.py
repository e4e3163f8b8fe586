"""The matchings that a graph makes, and torch models that follow them.

One pair of tokens that rounding matches otherwise changes an image's output by far more than rounding does. So the models that a
graph is held against merge as the graph did, and whether it was right to do so is judged apart (`judge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.forms.form import WeightProblem, compare
from exporter.onnx_safety import load_ir
from exporter.parity.merges.judge import Matched, MergeParity, judge_merge
from exporter.parity.taps import copied
from exporter.parity.yardsticks import Yardsticks
from exporter.passes.name_merges import BEST, KEYS, ORDER, TOKENS
from exporter.runners import Runner, graph_runner
from moee.errors import UserError
from moee.tokens.block import token_merges
from moee.tokens.merge import Choice, TokenMerge

PARTS = {TOKENS: ir.DataType.FLOAT, ORDER: ir.DataType.INT64, BEST: ir.DataType.INT64}


class MergeReader:
    """Reads the matchings of a graph by `runner`, a copy of it that also gives them out, and judges each by the merges of
    `yard.exact`."""

    def __init__(self, runner: Runner, yard: Yardsticks):
        self.runner, self.yard = runner, yard
        self.merges = token_merges(yard.exact.model)
        self.judged: dict[str, MergeParity] = {}

    def read(self, x: Tensor) -> dict[str, Matched]:
        """What each merge read and chose of images x [B, C, H, W]."""
        outputs = [torch.from_numpy(np.ascontiguousarray(a)) for a in self.runner.run(x.numpy())[1:]]
        found = {}
        for at, name in enumerate(self.merges):
            patches, order, best = outputs[3 * at : 3 * at + 3]
            found[name] = Matched(patches, Choice(order, best))
        return found

    @contextmanager
    def followed(self, x: Tensor) -> Iterator[None]:
        """Both models of the yardsticks merge the images x as the graph does, within the block."""
        found = self.read(x)
        for name, matched in found.items():
            judged = judge_merge(name, self.merges[name], matched)
            self.judged[name] = self.judged[name].also(judged) if name in self.judged else judged
        with ExitStack() as stack:
            for model in (self.yard.exact.model, self.yard.inner):
                for name, merge in token_merges(model).items():
                    stack.enter_context(_dictated(merge, found[name].choice))
            yield


def following(reader: MergeReader | None, x: Tensor) -> AbstractContextManager[None]:
    """`reader.followed`, or nothing for a model that merges no tokens."""
    return nullcontext() if reader is None else reader.followed(x)


@contextmanager
def _dictated(merge: TokenMerge, choice: Choice) -> Iterator[None]:
    def choose(h: Tensor) -> Choice:
        return Choice(choice.order.to(h.device), choice.best.to(h.device))

    merge.choose = choose  # type: ignore[method-assign]
    try:
        yield
    finally:
        del merge.choose


@contextmanager
def merge_reader(
    graph: Path, yard: Yardsticks, threads: int | None, provider: str, widened: bool = False
) -> Iterator[MergeReader | None]:
    """The reader of a graph whose model merges tokens; None for others. Raises `UserError` if the graph lacks a merge."""
    names = list(token_merges(yard.exact.model))
    if not names:
        yield None
        return
    model = load_ir(graph)
    values = {v.name: v for node in model.graph for v in node.outputs}
    for name in names:
        for part, kind in PARTS.items():
            value = values.get(f"{name}/{part}")
            if value is None:
                raise UserError(f"{graph} has no value {name}/{part}: it merges other tokens than the model; export it again")
            value.type = ir.TensorType(kind)
            model.graph.outputs.append(value)
    with copied(model, graph, widened) as path, graph_runner(path, threads, provider) as runner:
        yield MergeReader(runner, yard)


def check_merges(graph: Path, model: nn.Module, dtype: torch.dtype) -> list[WeightProblem]:
    """Compare the maps to keys that a graph stores with the model's; empty if all agree."""
    merges, problems = token_merges(model), []
    if not merges:
        return []
    values: Mapping[str | None, ir.Value] = {v.name: v for node in load_ir(graph).graph for v in node.outputs}
    for name, merge in merges.items():
        keys = values.get(f"{name}/{KEYS}")
        product = keys.producer() if keys is not None else None
        if keys is None or product is None:
            problems.append(WeightProblem(name, KEYS, f"{graph.name} has no value {name}/{KEYS}; export it again"))
            continue
        problems += compare(name, "merge weight", product.inputs[1], merge.weight.T, dtype)
        added = next((use.node for use in keys.uses() if use.node.op_type == "Add"), None)
        if added is not None:
            problems += compare(name, "merge bias", added.inputs[1 - list(added.inputs).index(keys)], merge.bias, dtype)
        elif merge.bias.any():
            problems.append(WeightProblem(name, "merge bias", f"{graph.name} adds no bias to the keys; export it again"))
    return problems
