"""The operator `moee::MoeeFfn`, version 1: the one place where its inputs and attributes are written down.

    scores(t) = x_t @ router.T + router_bias                       ties: lowest expert id
    y_t       = sum over e in top_k(scores(t)) of
                act(x_t @ w_up[S_e].T + b_up[S_e]) @ w_down[S_e] + b_out[e]

`S_e = neurons[offsets[e]:offsets[e + 1]]`. T is float32, float16 or bfloat16; scores and sums are float32.
A token with any score that is not finite gets all its scores replaced by zero: it goes to the lowest ids.
The tests hold the torch operator, the ONNX node, the kernels and the C++ plugin against this file.
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "moee"
OP_TYPE = "MoeeFfn"
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""

# Their places are the kernels' codes: new ones go to the end.
ACTIVATIONS: tuple[str, ...] = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu")
# Of these the operator of ONNX Runtime on a CPU has:
CPU_ACTIVATIONS = ACTIVATIONS[:5]
DTYPES: tuple[str, ...] = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Input:
    """One operator input. `dtype` is `T` (the token type), `float32` or `int32`; `dims` are symbolic sizes."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    meaning: str


@dataclass(frozen=True)
class Attribute:
    """One operator attribute. `kind` is `string`, `int` or `ints`; `default` None means that it must be given."""

    name: str
    kind: str
    default: str | int | tuple[int, ...] | None
    meaning: str


# Sizes: D token width, K experts, U union neurons, N = sum of the experts' widths.
INPUTS: tuple[Input, ...] = (
    Input("x", ("...", "D"), "T", "tokens"),
    Input("router", ("K", "D"), "T", "one row an expert"),
    Input("router_bias", ("K",), "float32", "0 for cosine, -|mu|^2/2 for Euclidean, or a learned bias"),
    Input("w_up", ("U", "D"), "T", "rows of fc1 that at least one expert keeps"),
    Input("b_up", ("U",), "T", "their biases"),
    Input("w_down", ("U", "D"), "T", "columns of fc2, transposed: a neuron is a row in both stores"),
    Input("b_out", ("K", "D"), "T", "output bias of each expert"),
    Input("neurons", ("N",), "int32", "neuron ids of each expert, ascending, concatenated"),
    Input("offsets", ("K + 1",), "int32", "expert e owns neurons[offsets[e]:offsets[e + 1]]"),
)

ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("activation", "string", "gelu", "one of ACTIVATIONS; `gelu` is the erf form, `quick_gelu` x * sigmoid(1.702 x)"),
    Attribute("top_k", "int", 1, "experts a token"),
    Attribute("max_width", "int", None, "neurons of the widest expert"),
    Attribute("load", "ints", (), "calibrated tokens an expert, in parts per million; empty means uniform"),
    Attribute("plugin_version", "string", PLUGIN_VERSION, "TensorRT's plugin look-up"),
    Attribute("plugin_namespace", "string", PLUGIN_NAMESPACE, "TensorRT's plugin look-up"),
)

INPUT_NAMES: tuple[str, ...] = tuple(i.name for i in INPUTS)
LOAD_UNIT = 1_000_000
