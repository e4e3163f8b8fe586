"""What a kind of routed layer is to the rest of the project: its name, its record in a manifest, and how it is rebuilt from one.

`moee.kinds.registry` lists the kinds. Whoever has a layer or a record asks there, and not what class it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict
from torch import Tensor

from moee.errors import UserError
from moee.layers.routed import RoutedLayer
from moee.models.ffn import FFN
from moee.schema import Text

INDICES = ("neurons", "offsets")


def _both_or_none(paths: tuple[str, ...]) -> tuple[str, ...]:
    if len(paths) not in (0, 2):
        raise ValueError("expected the paths of an activation and a down map, or none")
    return paths


# parts of a split MLP that pass their input on, since the layer takes the place of its up map; see `moee.models.ffn.FFN`
Bypassed = Annotated[tuple[Text, ...], AfterValidator(_both_or_none)]


class LayerRecord(BaseModel):
    """A layer as the manifest describes it: what rebuilds the module before its tensors are loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    activation: Text

    @property
    def num_experts(self) -> int:
        """Experts of the layer; a record that counts none is of a single function."""
        return getattr(self, "experts", 1)

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of the MLP's other parts, where it is no module of its own."""
        return getattr(self, "bypassed", ())


Record = TypeVar("Record", bound=LayerRecord)
Layer = TypeVar("Layer", bound=RoutedLayer)


class LayerKind(ABC, Generic[Record, Layer]):
    """A kind of layer. `name` is its `kind` in manifests, `module` its class, `record` what a manifest says of one."""

    name: ClassVar[str]
    module: ClassVar[type[RoutedLayer]]
    record: ClassVar[type[LayerRecord]]

    @abstractmethod
    def describe(self, name: str, layer: Layer) -> Record:
        """The record of the layer that stands at `name`."""

    @abstractmethod
    def shapes(self, record: Record) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that a record implies, by their names in the layer."""

    @abstractmethod
    def check(self, record: Record, ffn: FFN) -> None:
        """Raise `UserError` unless the layer of a record can stand where the model has the MLP `ffn`."""

    @abstractmethod
    def build(self, record: Record, tensors: Mapping[str, Any]) -> Layer:
        """The layer of a checked record and tensors of its `shapes`. Raises `UserError` where they contradict each other."""

    def rebuild(self, record: Record, state: Mapping[str, Tensor], ffn: FFN) -> Layer:
        """The layer of a record, from the tensors of `state`, for the model's MLP `ffn`; all is checked before it is used."""
        self.check(record, ffn)
        return self.build(record, checked_tensors(record.name, self.shapes(record), state))

    def body(self, name: str, layer: Layer) -> dict[str, Any]:
        """The record of a layer as the manifest holds it: a module of its own does not say that it bypasses nothing."""
        return self.describe(name, layer).model_dump(exclude=None if layer.bypassed else {"bypassed"})


def checked_tensors(name: str, shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the module `name` in `state`, the weights of an artifact. Raises `UserError` for one that is not there or
    is of another shape or type."""
    tensors = {}
    for part, shape in shapes.items():
        tensor = state.get(f"{name}.{part}")
        if tensor is None or tuple(tensor.shape) != shape:
            came = "nothing" if tensor is None else list(tensor.shape)
            raise UserError(f"model.safetensors: {name}.{part} should have shape {list(shape)}, came {came}")
        dtype = torch.int32 if part in INDICES else torch.float32
        if tensor.dtype != dtype:
            raise UserError(f"model.safetensors: {name}.{part} should be {dtype}, came {tensor.dtype}")
        tensors[part] = tensor
    return tensors


def refuse_gated(record: LayerRecord, ffn: FFN) -> None:
    """Raise `UserError` where a layer of experts is to stand for a gated MLP."""
    if ffn.gated:
        raise UserError(f"layer {record.name}: the manifest has experts there; the model has a gated MLP, which has none")
