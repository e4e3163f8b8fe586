"""The ONNX schema of `moee::MoeeFfn`, made from `plugins.contract` and registered with onnx."""

from __future__ import annotations

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


def clear_schema() -> OpSchema:
    """The node that a CLEAR-MoE layer is while it is being exported; `passes.clear` lowers it, no file holds it."""
    ints = OpSchema.Attribute("ranks", OpSchema.AttrType.INTS, description="r1, q1, r2, q2", required=True)
    text = OpSchema.Attribute("activation", OpSchema.AttrType.STRING, description="of the hidden layer", required=True)
    return OpSchema(
        CLEAR,
        DOMAIN,
        VERSION,
        doc="Two low-rank maps with a shared basis and residual experts.",
        inputs=[OpSchema.FormalParameter(name, "T", "") for name in CLEAR_INPUTS],
        outputs=[OpSchema.FormalParameter("y", "T", "same shape as x")],
        type_constraints=[("T", ["tensor(float)"], "token type")],
        attributes=[ints, text],
    )


def gated_schema() -> OpSchema:
    """The node that a pruned gated MLP is while it is being exported; `passes.gated` lowers it, no file holds it."""
    text = OpSchema.Attribute("activation", OpSchema.AttrType.STRING, description="of the gate", required=True)
    return OpSchema(
        GATED,
        DOMAIN,
        VERSION,
        doc="Gated MLP, down(act(gate(x)) * up(x)).",
        inputs=[OpSchema.FormalParameter(name, "T", "") for name in ("x", *GATED_INPUTS)],
        outputs=[OpSchema.FormalParameter("y", "T", "same shape as x")],
        type_constraints=[("T", [ONNX_TYPES[d] for d in DTYPES], "token type")],
        attributes=[text],
    )


def low_rank_schema() -> OpSchema:
    """The node that a low-rank MLP is while it is being exported; `passes.low_rank` lowers it, no file holds it."""
    text = OpSchema.Attribute("activation", OpSchema.AttrType.STRING, description="of the hidden layer", required=True)
    return OpSchema(
        LOW_RANK,
        DOMAIN,
        VERSION,
        doc="MLP whose two maps are products of two smaller ones.",
        inputs=[OpSchema.FormalParameter(name, "T", "") for name in ("x", *LOW_RANK_INPUTS)],
        outputs=[OpSchema.FormalParameter("y", "T", "same shape as x")],
        type_constraints=[("T", [ONNX_TYPES[d] for d in DTYPES], "token type")],
        attributes=[text],
    )


def register() -> None:
    """Register the schemas once, so that onnx's checker and onnxscript know the operators."""
    made = ((OP_TYPE, schema), (CLEAR, clear_schema), (GATED, gated_schema), (LOW_RANK, low_rank_schema))
    for name, make in made:
        if not onnx.defs.has(name, VERSION, DOMAIN):
            onnx.defs.register_schema(make())
