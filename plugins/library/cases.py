"""`cases.bin`: layers with tokens and the float64 answer, for the self-test (read by selftest/cases/cases.cpp).

One answer serves float32, float16 and bfloat16: the values of a case are rounded until all of its types hold them exactly.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moee.errors import UserError
from moee.store.atomic import atomic_file
from plugins.contract import ACTIVATIONS, DTYPES, INPUT_NAMES, INPUTS, PLUGIN_VERSION
from plugins.kernels.common import activate_reference
from plugins.reference import routes, scores

FORMAT = 1
MAGIC = b"MOEECASE"
HEADER_BYTES, CASE_BYTES, NAME_BYTES, ALIGNMENT = 64, 128, 64, 16
MARGIN = 2.0**-18  # of a score's magnitude: closer than this, float32 sums may order two experts either way
FLOAT_INPUTS = tuple(i.name for i in INPUTS if i.dtype == "T")
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """A layer and its tokens: `inputs` by the names of plugins/contract.py, x [T, D].

    `types` are those that the answer holds in, `timed` those that are timed, at `per_image` tokens an image against a dense FFN
    of `dense_width` neurons (default: the union's). `exact_ties`: equal scores are of equal router rows, so that every kernel
    sees them equal.
    """

    name: str
    inputs: Mapping[str, torch.Tensor]
    activation: int = 0
    top_k: int = 1
    types: tuple[str, ...] = DTYPES
    timed: tuple[str, ...] = ()
    per_image: int = 1
    dense_width: int | None = None
    is_layer: bool = False
    exact_ties: bool = False


def storage(types: Sequence[str]) -> str:
    """The narrowest of `types`, in which a case's values are kept."""
    return next(t for t in ("bfloat16", "float16", "float32") if t in types)


def rounded(values: torch.Tensor, types: Sequence[str]) -> torch.Tensor:
    """`values` rounded until every type of `types` holds them exactly, as float64. Raises `UserError` where one overflows."""
    out = values.double()
    for name in ("float32", "bfloat16", "float16"):  # a bfloat16 that is rounded to float16 is still a bfloat16
        if name in types:
            out = out.to(getattr(torch, name)).double()
    if bool((torch.isinf(out) & ~torch.isinf(values)).any()):
        raise UserError(f"the layer holds values beyond {' and '.join(types)}; export it in float32 or bfloat16")
    return out


def answer(inputs: Mapping[str, torch.Tensor], activation: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routes [T, top_k] int64, y [T, D] and scale [T] in float64.

    The scale is what rounding is relative to: the largest output of a token, and the norm of the products that add up to one. It
    is 0 for a token that is not finite, whose answer is NaN.
    """
    x, _, _, w_up, b_up, w_down, b_out, neurons, offsets = (inputs[name] for name in INPUT_NAMES)
    chosen = routes(x, inputs["router"], inputs["router_bias"], top_k)
    y, squares = torch.zeros_like(x), torch.zeros_like(x)
    for e in range(len(offsets) - 1):
        token, _ = torch.where(chosen == e)
        keep = neurons[int(offsets[e]) : int(offsets[e + 1])].long()
        hidden = activate_reference(x[token] @ w_up[keep].T + b_up[keep], activation)
        y[token] += hidden @ w_down[keep] + b_out[e]
        squares[token] += hidden.square() @ w_down[keep].square()
    scale = y.abs().amax(1) + squares.amax(1).sqrt()
    return chosen, y, torch.where(torch.isfinite(x).all(1), scale, 0.0)


def decided(inputs: Mapping[str, torch.Tensor], top_k: int) -> torch.Tensor:
    """[T] bool: whether the choice of a token's experts, and their order, is the same in float32 sums."""
    x, router, bias = (inputs[name] for name in ("x", "router", "router_bias"))
    ranked = scores(x, router, bias).sort(1, descending=True).values
    gaps = ranked[:, :-1][:, :top_k] - ranked[:, 1:][:, :top_k]
    size = (x.abs() @ router.abs().T + bias.abs()).amax(1, keepdim=True)
    return (gaps > MARGIN * size).all(1) | ~torch.isfinite(x).all(1)


def case_bytes(case: LayerCase) -> bytes:
    """One case as it lies in the file. Tokens whose choice is too close to call are left out, since either answer is right.

    Raises `UserError` where none is left, or a value is beyond a type.
    """
    inputs: Inputs = {name: case.inputs[name].detach().cpu() for name in INPUT_NAMES}
    for name in FLOAT_INPUTS:
        inputs[name] = rounded(inputs[name], case.types)
    inputs["router_bias"] = inputs["router_bias"].float().double()
    if not case.exact_ties:
        inputs["x"] = inputs["x"][decided(inputs, case.top_k)]
    if not len(inputs["x"]):
        raise UserError(f"{case.name}: every token lies between two experts; give other images")
    chosen, y, scale = answer(inputs, case.activation, case.top_k)
    tokens, dim = inputs["x"].shape
    union = inputs["b_up"].shape[0]
    widths = inputs["offsets"].diff()
    sizes = (tokens, dim, len(widths), union, len(inputs["neurons"]), int(widths.max()), case.top_k, case.activation)
    kept, dense = storage(case.types), case.dense_width or union
    facts = (DTYPES.index(kept), bits(case.types), bits(case.timed), case.per_image, dense, int(case.is_layer))
    label = case.name.encode("ascii", "replace")[: NAME_BYTES - 1]
    head = struct.pack(f"<{NAME_BYTES}s14i", label, *sizes, *facts)
    parts = [head + bytes(CASE_BYTES - len(head))]
    parts += [raw(inputs[i.name], kept if i.dtype == "T" else i.dtype) for i in INPUTS]
    parts += [raw(chosen, "int32"), raw(y, "float64"), raw(scale, "float64")]
    return b"".join(part + bytes(-len(part) % ALIGNMENT) for part in parts)


def bits(types: Sequence[str]) -> int:
    """One bit a type, as csrc/operator/tables.h numbers them."""
    return sum(1 << DTYPES.index(t) for t in types)


def raw(values: torch.Tensor, dtype: str) -> bytes:
    """Little-endian bytes of `values` in a type; NumPy has no bfloat16."""
    typed = values.to(getattr(torch, dtype)).contiguous()
    return (typed.view(torch.int16) if dtype == "bfloat16" else typed).numpy().tobytes()


def write_cases(path: Path, layers: Sequence[LayerCase] = ()) -> Path:
    """Write `layers` and behind them the synthetic cases, and return `path`. Raises `UserError` as `case_bytes`."""
    return write_file(path, (*layers, *synthetic_cases()))


def write_file(path: Path, cases: Sequence[LayerCase]) -> Path:
    """Write these cases alone."""
    blocks = [case_bytes(case) for case in cases]
    body = b"".join(blocks)
    head = struct.pack("<8s4IQ", MAGIC, FORMAT, int(PLUGIN_VERSION), len(blocks), zlib.crc32(body), HEADER_BYTES + len(body))
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(head + bytes(HEADER_BYTES - len(head)) + body)
    return Path(path)


def random_inputs(tokens: int, dim: int, widths: Sequence[int], union: int, seed: int = 0) -> Inputs:
    """Inputs of the operator: an expert a width, each with that many neurons out of `union`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    picks = [torch.randperm(union, generator=generator)[:w].sort().values.int() for w in widths]
    experts = len(widths)
    return {
        "x": normal(tokens, dim),
        "router": normal(experts, dim),
        "router_bias": normal(experts),
        "w_up": normal(union, dim, scale=dim**-0.5),
        "b_up": normal(union, scale=0.1),
        "w_down": normal(union, dim, scale=max(widths) ** -0.5),
        "b_out": normal(experts, dim, scale=0.1),
        "neurons": torch.cat(picks),
        "offsets": torch.tensor([0, *torch.tensor(widths).cumsum(0).tolist()], dtype=torch.int32),
    }


def synthetic_cases() -> tuple[LayerCase, ...]:
    """Small layers with odd sizes, each for what it alone shows."""
    odd = [37, 5, 80, 1, 64, 33, 17]
    act = {name: code for code, name in enumerate(ACTIVATIONS)}
    empty, one, lost, ties = (random_inputs(40, 64, [24, 7, 40, 16], 72, seed) for seed in range(4))
    empty["router_bias"][2] = -1e4
    one["router_bias"][1] = 1e4
    for token, value in ((3, float("nan")), (7, float("inf")), (21, float("-inf"))):
        lost["x"][token, 5] = value
    ties["router"][2], ties["router_bias"][2] = ties["router"][0], ties["router_bias"][0]
    return (
        LayerCase(name="one token", inputs=random_inputs(1, 48, [24, 9, 16], 30, 4), activation=act["gelu_tanh"]),
        LayerCase(name="odd sizes", inputs=random_inputs(57, 96, odd, 101, 5)),
        LayerCase(name="empty expert", inputs=empty, activation=act["relu"]),
        LayerCase(name="all to one", inputs=one, activation=act["silu"]),
        LayerCase(name="top-2", inputs=random_inputs(57, 96, odd, 101, 6), top_k=2),
        LayerCase(name="NaN tokens", inputs=lost),
        LayerCase(name="ties", inputs=ties, top_k=2, exact_ties=True),
        LayerCase(name="one expert", inputs=random_inputs(19, 64, [50], 50, 7)),
        LayerCase(name="64 experts", inputs=random_inputs(130, 64, [8] * 64, 90, 8), activation=act["quick_gelu"]),
        LayerCase(name="wide", inputs=random_inputs(30, 400, [16] * 5, 64, 9)),
        LayerCase(name="many tokens", inputs=random_inputs(520, 16, [16] * 5, 32, 10)),
        LayerCase(name="float32 digits", inputs=random_inputs(30, 96, odd, 101, 11), types=("float32",)),
        LayerCase(name="float16 digits", inputs=random_inputs(30, 96, odd, 101, 12), types=("float16",)),
    )


def stand_in() -> LayerCase:
    """A layer of DeiT-S's sizes with half of the MACs and random weights, to be timed where no export is given."""
    inputs = random_inputs(197, 384, [768] * 4, 1536, 13)
    return LayerCase(name="random, as DeiT-S", inputs=inputs, types=("float16",), timed=("float16",), per_image=197)
