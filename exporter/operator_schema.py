"""The ONNX schema of `moee::MoeeFfn`, made from `plugins.contract` and registered with onnx."""

from __future__ import annotations

import onnx.defs
from onnx.defs import OpSchema

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


def register() -> None:
    """Register the schema once, so that onnx's checker and onnxscript know the operator."""
    if not onnx.defs.has(OP_TYPE, VERSION, DOMAIN):
        onnx.defs.register_schema(schema())
