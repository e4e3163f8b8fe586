"""Run a Triton kernel on the CPU, in Triton's own interpreter, and watch its memory traffic.

Triton decides by an environment variable at import whether `triton.jit` compiles or interprets. Here both are needed
in one process (the ahead-of-time build compiles what the tests interpret), so a kernel is re-bound on demand: its
function is copied with a namespace in which every device function it calls is an interpreted one.

Programs run one after another, so the interpreter shows no race. `Watch` makes up for it: it can shuffle the program
order, checks that every address lies inside an argument, and counts the writes to each element.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.experimental.gluon  # noqa: F401  Triton imports it at the first launch, and then wants unswapped functions
import triton.language as tl
from triton.language import core, standard
from triton.runtime import interpreter as backend

LIBRARY: tuple[types.ModuleType, ...] = (tl, core, standard)


class DeviceFunction(backend.InterpretedFunction):
    """A function called from a kernel. Triton's own class patches the language at each call and never undoes it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


@cache
def interpret(kernel: Any) -> Any:
    """The interpreted twin of a `triton.jit` function, device functions included."""
    namespace: dict[str, Any] = {}
    twin = types.FunctionType(kernel.fn.__code__, namespace, kernel.fn.__name__, kernel.fn.__defaults__)
    twin.__annotations__ = kernel.fn.__annotations__
    twin.__module__ = kernel.fn.__module__
    # Only what the code names: the interpreter patches every module it finds in the namespace.
    for name in _names(kernel.fn.__code__, kernel.fn.__globals__):
        value = kernel.fn.__globals__[name]
        namespace[name] = interpret(value) if isinstance(value, triton.runtime.JITFunction) else value
    namespace["__builtins__"] = __builtins__
    namespace["core"] = core  # the interpreter patches the language modules that a kernel's namespace holds
    return DeviceFunction(twin)


def _names(code: types.CodeType, known: Mapping[str, Any]) -> set[str]:
    names = {n for n in code.co_names if n in known}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant, known)
    return names | {n for n, v in known.items() if isinstance(v, types.ModuleType)}


@dataclass
class Watch:
    """What to check while kernels run. `seed` shuffles the program order; None keeps it."""

    seed: int | None = None
    count_writes: bool = True
    ranges: list[tuple[int, int, str]] = field(default_factory=list)
    writes: list[np.ndarray] = field(default_factory=list)

    def allow(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Only addresses inside these tensors may be touched from now on."""
        self.ranges = sorted(
            (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name) for name, t in tensors.items()
        )

    def check(self, pointers: np.ndarray, mask: np.ndarray, size: int, what: str) -> None:
        """Raises IndexError if an active address lies outside every allowed tensor."""
        active = pointers.reshape(-1)[np.broadcast_to(mask, pointers.shape).reshape(-1).astype(bool)].astype(np.int64)
        if not self.ranges or not active.size:
            return
        starts = np.array([r[0] for r in self.ranges], dtype=np.int64)
        ends = np.array([r[1] for r in self.ranges], dtype=np.int64)
        at = np.searchsorted(starts, active, side="right") - 1
        bad = (at < 0) | (active + size > ends[np.maximum(at, 0)])
        if bad.any():
            near = self.ranges[int(max(at[bad][0], 0))]
            offset = int(active[bad][0]) - near[0]
            raise IndexError(
                f"{what} of {int(bad.sum())} addresses outside every buffer; first: {near[2]} + {offset} bytes"
            )

    def count(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        """Remember one write to each active address."""
        self.writes.append(pointers.reshape(-1)[np.broadcast_to(mask, pointers.shape).reshape(-1).astype(bool)])

    def write_counts(self, tensor: torch.Tensor) -> torch.Tensor:
        """How often each element of a contiguous tensor was stored to; shape of the tensor."""
        size, start = tensor.element_size(), tensor.data_ptr()
        written = np.concatenate([np.empty(0, np.int64), *(w.astype(np.int64) for w in self.writes)])
        written = written[(written >= start) & (written < start + tensor.numel() * size)]
        counts = np.bincount((written - start) // size, minlength=tensor.numel())
        return torch.from_numpy(counts).reshape(tensor.shape)


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Route the interpreter's loads, stores, atomics and program ids through `watch`."""
    builder = backend.interpreter_builder
    kind = type(builder)
    generator = np.random.default_rng(watch.seed)
    order: dict[str, Any] = {}

    def masked_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        watch.check(ptrs.data, mask.data, _item_size(ptrs), "load")
        return kind.create_masked_load(builder, ptrs, mask, *rest)

    def masked_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.check(ptrs.data, mask.data, _item_size(ptrs), "store")
        if watch.count_writes:
            watch.count(ptrs.data, mask.data)
        return kind.create_masked_store(builder, ptrs, value, mask, *rest)

    def atomic(op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        watch.check(ptr.data, mask.data, _item_size(ptr), "atomic")
        return kind.create_atomic_rmw(builder, op, ptr, val, mask, *rest)

    def grid_dim(nx: int, ny: int, nz: int) -> None:
        order["dim"], order["order"] = (nx, ny, nz), generator.permutation(nx * ny * nz)
        kind.set_grid_dim(builder, nx, ny, nz)

    def grid_idx(x: int, y: int, z: int) -> None:
        nx, ny, nz = order["dim"]
        n = int(order["order"][(x * ny + y) * nz + z]) if watch.seed is not None else (x * ny + y) * nz + z
        kind.set_grid_idx(builder, n // (ny * nz), n // nz % ny, n % nz)

    patches = {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "create_atomic_rmw": atomic,
        "set_grid_dim": grid_dim,
        "set_grid_idx": grid_idx,
    }
    for name, function in patches.items():
        setattr(builder, name, function)
    try:
        yield watch
    finally:
        for name in patches:
            delattr(builder, name)


def _item_size(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


@contextmanager
def _interpreted_library() -> Iterator[None]:
    """`tl.sum`, `tl.zeros` and their like are jit functions themselves: swap them for interpreted ones meanwhile."""
    swapped: list[tuple[types.ModuleType, str, Any]] = []
    for module in LIBRARY:
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction):
                swapped.append((module, name, value))
                setattr(module, name, _library_twin(value))
    backend.interpreter_builder.create_dot = _dot
    patch_tensor = backend._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        # Triton 3.6 makes an integer of an array of one element, which NumPy 2.5 refuses.
        tensor.__index__ = lambda value: int(value.handle.data.squeeze())

    backend._patch_lang_tensor = patch_tensor_and_index
    try:
        yield
    finally:
        backend._patch_lang_tensor = patch_tensor
        del backend.interpreter_builder.create_dot
        for module, name, value in swapped:
            setattr(module, name, value)


def _dot(a: Any, b: Any, d: Any, *_: Any) -> Any:
    """Block product in float32, each row summed the same way wherever it stands in the block.

    Triton's own uses BLAS, whose sums depend on a row's position, and multiplies bfloat16 as the uint16 it is kept in.
    """
    left, right = (
        (h.data.astype(np.uint32) << 16).view(np.float32) if h.get_element_ty() == tl.bfloat16 else h.data
        for h in (a, b)
    )
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.einsum("ik,kj->ij", left.astype(d.data.dtype), right.astype(d.data.dtype))
        return backend.TensorHandle(product + d.data, d.dtype.scalar)


@cache
def _library_twin(function: Any) -> Any:
    return DeviceFunction(function.fn)


def run(kernel: Any, grid: tuple[int, int, int], arguments: Mapping[str, Any]) -> None:
    """Run `kernel` on CPU tensors, in place.

    Triton's own launcher copies every storage and back; the sub-buffers of a workspace and the address checks need the
    real ones, so this passes the tensors themselves.
    """
    twin = interpret(kernel)
    body = backend.GridExecutor(twin.rewrite(), twin.arg_names, grid)
    body._init_args_hst = lambda args, kwargs: (list(args), dict(kwargs))  # type: ignore[method-assign]
    body._restore_args_dev = lambda *_: None  # type: ignore[method-assign]
    with _interpreted_library():
        body(**arguments)
