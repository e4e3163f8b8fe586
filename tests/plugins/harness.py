"""The compiled plugin from Python: csrc/harness.cpp through ctypes, and inputs for one layer.

Torch is imported by whoever calls, after the driver that the plugin is to find.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from plugins.contract import ACTIVATIONS, INPUT_NAMES
from plugins.workspace import Sizes

DATA_TYPES = {"float32": 0, "float16": 1, "bfloat16": 7}  # nvinfer1::DataType


class Case(ctypes.Structure):
    """Mirrors `Case` of csrc/host.h."""

    _fields_ = [
        *(("lead_count", ctypes.c_int32), ("lead", ctypes.c_int64 * 4), ("dim", ctypes.c_int64)),
        *(("experts", ctypes.c_int64), ("union", ctypes.c_int64), ("neurons", ctypes.c_int64)),
        ("type", ctypes.c_int32),
    ]


def aligned(count: int, dtype: torch.dtype, fill: float | None = None) -> torch.Tensor:
    """A tensor that starts on a 256-byte boundary, as device memory does."""
    item = torch.empty((), dtype=dtype).element_size()
    raw = torch.empty(count * item + 256, dtype=torch.uint8)
    start = -raw.data_ptr() % 256
    tensor = raw[start : start + count * item].view(dtype)
    return tensor if fill is None else tensor.fill_(fill)


def make_inputs(sizes: Sizes, dtype: torch.dtype, seed: int, widths: list[int]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        value = torch.randn(*shape, generator=g) * scale
        return aligned(value.numel(), dtype).view(shape).copy_(value)

    picks = [torch.randperm(sizes.union_size, generator=g)[:w].sort().values.int() for w in widths]
    offsets = torch.tensor([0, *torch.tensor(widths).cumsum(0).tolist()], dtype=torch.int32)
    neurons = torch.cat(picks)
    inputs = {
        "x": normal(sizes.tokens, sizes.dim),
        "router": normal(sizes.experts, sizes.dim),
        "router_bias": aligned(sizes.experts, torch.float32).copy_(torch.randn(sizes.experts, generator=g)),
        "w_up": normal(sizes.union_size, sizes.dim, scale=sizes.dim**-0.5),
        "b_up": normal(sizes.union_size, scale=0.1),
        "w_down": normal(sizes.union_size, sizes.dim, scale=sizes.max_width**-0.5),
        "b_out": normal(sizes.experts, sizes.dim, scale=0.1),
        "neurons": aligned(len(neurons), torch.int32).copy_(neurons),
        "offsets": aligned(len(offsets), torch.int32).copy_(offsets),
    }
    assert tuple(inputs) == INPUT_NAMES
    return inputs


def case_of(lead: tuple[int, ...], sizes: Sizes, neurons: int, dtype: str) -> Case:
    """`lead` are the leading dimensions of x; `neurons` the sum of the experts' widths."""
    case = Case(lead_count=len(lead), dim=sizes.dim, experts=sizes.experts, union=sizes.union_size, neurons=neurons)
    case.type = DATA_TYPES[dtype]
    for i, n in enumerate(lead):
        case.lead[i] = n
    return case


class Harness:
    """One plugin library. Layers are handles; every call returns the plugin's own code, 0 for success."""

    def __init__(self, library: Path, plugin: Path):
        self.c = ctypes.CDLL(str(library))
        for name in ("harness_create", "harness_recreate", "harness_attach"):
            getattr(self.c, name).restype = ctypes.c_void_p
        for name in ("harness_log", "harness_creator", "harness_timing_id"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.c.harness_workspace.restype = ctypes.c_size_t
        assert self.c.harness_open(str(plugin).encode()) == 0, self.log()

    def log(self) -> str:
        return self.c.harness_log().decode()

    def clear_log(self) -> None:
        self.c.harness_clear_log()

    def create(self, activation: int, top_k: int, max_width: int, load: list[int]) -> int:
        values = (ctypes.c_int32 * len(load))(*load)
        return self._made(self.c.harness_create(ACTIVATIONS[activation].encode(), top_k, max_width, values, len(load)))

    def configure(self, layer: int, case: Case) -> None:
        at = ctypes.byref(case)
        assert self.c.harness_configure(ctypes.c_void_p(layer), at, at, at) == 0, self.log()

    def tactics(self, layer: int) -> list[int]:
        ids = (ctypes.c_int32 * 64)()
        return list(ids[: self.c.harness_tactics(ctypes.c_void_p(layer), ids, 64)])

    def workspace(self, layer: int, case: Case) -> int:
        return self.c.harness_workspace(ctypes.c_void_p(layer), ctypes.byref(case))

    def recreate(self, layer: int) -> int:
        return self._made(self.c.harness_recreate(ctypes.c_void_p(layer)))

    def attach(self, layer: int) -> int:
        return self._made(self.c.harness_attach(ctypes.c_void_p(layer)))

    def shape_change(self, layer: int, case: Case) -> None:
        assert self.c.harness_shape_change(ctypes.c_void_p(layer), ctypes.byref(case)) == 0, self.log()

    def set_tactic(self, layer: int, tactic: int) -> None:
        assert self.c.harness_set_tactic(ctypes.c_void_p(layer), tactic) == 0, self.log()

    def enqueue(
        self, layer: int, case: Case, inputs: dict[str, torch.Tensor], y: torch.Tensor, memory: torch.Tensor, stream: int = 0
    ) -> int:
        addresses = (ctypes.c_void_p * len(INPUT_NAMES))(*(inputs[n].data_ptr() for n in INPUT_NAMES))
        pointers = (ctypes.c_void_p(p) for p in (y.data_ptr(), memory.data_ptr(), stream))
        return self.c.harness_enqueue(ctypes.c_void_p(layer), ctypes.byref(case), addresses, *pointers)

    def destroy(self, *layers: int) -> None:
        for layer in set(layers):
            self.c.harness_destroy(ctypes.c_void_p(layer))

    def _made(self, handle: int | None) -> int:
        assert handle, self.log()
        return handle
