"""Every kind of routed layer, one line each, and what follows from having one: its record, its rebuilding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moee.errors import UserError
from moee.kinds.clear import ClearKind
from moee.kinds.gated import GatedKind
from moee.kinds.kind import LayerKind, LayerRecord
from moee.kinds.low_rank import LowRankKind
from moee.kinds.routed import RoutedKind
from moee.layers.routed import RoutedLayer, routed_layers
from moee.mlps.sites import put_mlp
from moee.mlps.structure import read_mlp
from moee.schema import checked, shown

FIRST = RoutedKind()
KINDS: dict[str, LayerKind[Any, Any]] = {kind.name: kind for kind in (FIRST, ClearKind(), GatedKind(), LowRankKind())}


def kind_of(layer: RoutedLayer) -> LayerKind[Any, Any]:
    """The kind of a layer."""
    found = next((kind for kind in KINDS.values() if type(layer) is kind.module), None)
    assert found is not None, f"{type(layer).__name__} is no kind of layer; list it in {__name__}"
    return found


def layer_records(model: nn.Module) -> list[dict[str, Any]]:
    """What the manifest says about each routed layer: enough to rebuild it around its tensors."""
    return [kind_of(layer).body(name, layer) for name, layer in routed_layers(model).items()]


def read_record(item: Mapping[str, Any], path: Path) -> LayerRecord:
    """A layer of the manifest `path`, checked. Raises `UserError` for an unknown kind or wrong fields."""
    name = item.get("kind", FIRST.name)
    named = [known for known in KINDS if known != FIRST.name]  # manifests do not name the first
    if "kind" in item and name not in named:
        raise UserError(f"{path} has a layer of the kind {shown(name)}; expected one of {', '.join(named)}")
    return checked(KINDS[name].record, dict(item), path)


def rebuild_layer(model: nn.Module, record: LayerRecord, state: Mapping[str, Tensor]) -> None:
    """Replace an MLP of the dense `model` by the layer of `record` with the tensors of `state`. Raises `UserError` where they do
    not fit."""
    kind = next(kind for kind in KINDS.values() if type(record) is kind.record)
    put_mlp(model, record.name, kind.rebuild(record, state, read_mlp(model, record.name, record.parts)), record.parts)


def rebuild_layers(model: nn.Module, records: Sequence[Mapping[str, Any]], state: Mapping[str, Tensor]) -> None:
    """`rebuild_layer` for each of `records`, as of `layer_records`."""
    for item in records:
        rebuild_layer(model, read_record(item, Path("what rank 0 sent")), state)
