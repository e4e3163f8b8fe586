"""Narrowed attentions in a manifest: what it says of them, and how they are rebuilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt
from timm.layers import Attention
from torch import Tensor, nn

from moee.errors import UserError
from moee.kinds.kind import checked_tensors
from moee.mlps.attention import NarrowAttention, Widths, find_attentions, narrow_attentions
from moee.models.model import replace_module
from moee.schema import Text, shown

MAX_HEAD = 1 << 14  # dimensions of a head


class AttentionRecord(BaseModel):
    """A narrowed attention as the manifest describes it: dimensions a head of query and key, and of the values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    qk: StrictInt = Field(ge=1, le=MAX_HEAD)
    v: StrictInt = Field(ge=1, le=MAX_HEAD)


def attention_records(model: nn.Module) -> list[dict[str, Any]]:
    """What the manifest says about each narrowed attention."""
    layers = narrow_attentions(model).items()
    return [AttentionRecord(name=name, qk=layer.widths.qk, v=layer.widths.v).model_dump() for name, layer in layers]


def rebuild_attention(model: nn.Module, records: list[AttentionRecord], state: dict[str, Tensor], path: Path) -> None:
    """Replace attentions of the dense `model` by narrowed ones with the tensors of `state`.

    Raises `UserError` for a layer that the model does not have, or tensors that do not fit."""
    for name, (attention, widths, tensors) in narrowed_in(model, records, state, path).items():
        made = NarrowAttention(attention.qkv.in_features, attention.num_heads, attention.head_dim, widths)
        made.load_state_dict(tensors)
        replace_module(model, name, made)


def narrowed_in(
    model: nn.Module, records: list[AttentionRecord], state: dict[str, Tensor], path: Path
) -> dict[str, tuple[Attention, Widths, dict[str, Tensor]]]:
    """Each record's original, its widths, and its tensors, whose shapes are checked. `model` may have no memory. Raises
    `UserError` for a record or a tensor that does not fit the model."""
    if not records:
        return {}
    try:
        attentions = find_attentions(model)
    except UserError as error:
        raise UserError(f"{path} narrows attention, but {str(error).partition(';')[0]}; make the artifact again") from error
    found = {}
    for record in records:
        attention = attentions.get(record.name)
        if attention is None:
            raise UserError(f"{path} narrows {shown(record.name)}, which is no attention of the model; make the artifact again")
        dim, heads, whole = attention.qkv.in_features, attention.num_heads, attention.head_dim
        if not all(whole <= 2 * width <= 2 * whole for width in (record.qk, record.v)):
            came = f"{record.qk} and {record.v} dimensions"
            raise UserError(f"{path}: heads of {shown(record.name)} have {came}; expected {-(-whole // 2)} to {whole}")
        shapes: dict[str, tuple[int, ...]] = {
            "q.weight": (heads * record.qk, dim), "q.bias": (heads * record.qk,), "k.weight": (heads * record.qk, dim),
            "v.weight": (heads * record.v, dim), "v.bias": (heads * record.v,), "proj.weight": (dim, heads * record.v),
            "proj.bias": (dim,),
        }  # fmt: skip
        found[record.name] = (attention, Widths(record.qk, record.v), checked_tensors(record.name, shapes, state))
    return found
