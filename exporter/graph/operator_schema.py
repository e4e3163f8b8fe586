"""The ONNX schema of `moee::MoeeFfn`, made from `plugins.contract` and registered with onnx."""

from __future__ import annotations

from collections.abc import Sequence

import onnx.defs
from onnx.defs import OpSchema

from exporter.passes.clear import INPUT_NAMES as CLEAR_INPUTS
from exporter.passes.clear import OP_TYPE as CLEAR
from exporter.passes.gated import OP_TYPE as GATED
from exporter.passes.low_rank import OP_TYPE as LOW_RANK
from moee.layers.low_rank import NAMES as LOW_RANK_INPUTS
from moee.mlps.gated import NAMES as GATED_INPUTS
from plugins.contract import ACTIVATIONS, ATTRIBUTES, DOMAIN, DTYPES, INPUTS, OP_TYPE

VERSION = 1
ONNX_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)", "int32": "tensor(int32)"}
_KINDS = {"string": OpSchema.AttrType.STRING, "int": OpSchema.AttrType.INT, "ints": OpSchema.AttrType.INTS}


def _attribute(name: str, kind: str, default: str | int | tuple[int, ...] | None, meaning: str) -> OpSchema.Attribute:
    if default is None:
        return OpSchema.Attribute(name, _KINDS[kind], description=meaning, required=True)
    return OpSchema.Attribute(name, onnx.helper.make_attribute(name, default, attr_type=_attr_type(kind)), description=meaning)


def _attr_type(kind: str) -> int:
    return {"string": onnx.AttributeProto.STRING, "int": onnx.AttributeProto.INT, "ints": onnx.AttributeProto.INTS}[kind]


def schema() -> OpSchema:
    """The operator's schema: input and attribute names and types as in the contract."""
    types = {"T": "T", **ONNX_TYPES}
    return OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        doc=f"Routed feed-forward network; activation is one of {', '.join(ACTIVATIONS)}.",
        inputs=[OpSchema.FormalParameter(i.name, types[i.dtype], f"{i.meaning} [{', '.join(i.dims)}]") for i in INPUTS],
        outputs=[OpSchema.FormalParameter("y", "T", "same shape as x")],
        type_constraints=[("T", [ONNX_TYPES[d] for d in DTYPES], "token type")],
        attributes=[_attribute(a.name, a.kind, a.default, a.meaning) for a in ATTRIBUTES],
    )


def _while_exported(name: str, inputs: Sequence[str], doc: str, types: Sequence[str] = DTYPES, ranks: bool = False) -> OpSchema:
    """The node that a layer is while it is being exported; a pass lowers it, no file holds it."""
    attributes = [_attribute("ranks", "ints", None, "r1, q1, r2, q2")] if ranks else []
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        doc=doc,
        inputs=[OpSchema.FormalParameter(part, "T", "") for part in inputs],
        outputs=[OpSchema.FormalParameter("y", "T", "same shape as x")],
        type_constraints=[("T", [ONNX_TYPES[d] for d in types], "token type")],
        attributes=[*attributes, _attribute("activation", "string", None, "of the hidden layer, or of the gate")],
    )


def register() -> None:
    """Register the schemas once, so that onnx's checker and onnxscript know the operators."""
    made = {
        OP_TYPE: schema,
        CLEAR: lambda: _while_exported(
            CLEAR, CLEAR_INPUTS, "Two low-rank maps with a shared basis and residual experts.", ("float32",), ranks=True
        ),
        GATED: lambda: _while_exported(GATED, ("x", *GATED_INPUTS), "Gated MLP, down(act(gate(x)) * up(x))."),
        LOW_RANK: lambda: _while_exported(
            LOW_RANK, ("x", *LOW_RANK_INPUTS), "MLP whose two maps are products of two smaller ones."
        ),
    }
    for name, make in made.items():
        if not onnx.defs.has(name, VERSION, DOMAIN):
            onnx.defs.register_schema(make())
