"""Merged tokens in a manifest: how many each block merges, and how the blocks are rebuilt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt
from torch import nn

from moee.data.transform import model_transform
from moee.errors import UserError
from moee.models.model import MAX_DEPTH
from moee.tokens.block import install_merging, merged_tokens
from moee.tokens.schedule import block_costs


class MergingRecord(BaseModel):
    """Tokens that each block merges, in the order of the blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    merged: list[Annotated[StrictInt, Field(ge=0)]] = Field(min_length=1, max_length=MAX_DEPTH)


def merging_record(model: nn.Module) -> dict[str, list[int]] | None:
    """What the manifest says of the tokens that a model merges; None for one that merges none."""
    merged = merged_tokens(model)
    return MergingRecord(merged=merged).model_dump() if merged else None


def check_merging_record(model: nn.Module, record: MergingRecord | None, path: Path) -> None:
    """Raise `UserError` unless `model`, which merges no tokens and may have no memory, can merge what the record says."""
    if record is None:
        return
    try:
        costs = block_costs(model, model_transform(model).shape)
    except UserError as error:
        raise UserError(f"{path} merges tokens, but {str(error).partition(';')[0]}; make the artifact again") from error
    if len(record.merged) != len(costs.blocks):
        came = f"{len(record.merged)} blocks"
        raise UserError(f"{path} merges tokens in {came}, and the model has {len(costs.blocks)}; make the artifact again")
    over = costs.overfull(record.merged)
    if over is not None or not any(record.merged):
        what = "no tokens" if over is None else f"{record.merged[over[0]]} of {over[1]} patches in block {over[0]}"
        raise UserError(f"{path} merges {what}, which no extraction does; make the artifact again")


def rebuild_merging(model: nn.Module, record: MergingRecord | None) -> None:
    """Put the merging blocks of a checked record into `model`; the weights of their artifact are still to be loaded."""
    if record is not None:
        install_merging(model, record.merged)
