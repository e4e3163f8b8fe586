"""Run a whole tactic from Python: real launches on CUDA tensors, Triton's interpreter on CPU tensors.

This is what the C++ plugin's `enqueue` does, in the same order with the same grids; TensorRT is not involved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from plugins import interpreter
from plugins.contract import ACTIVATIONS
from plugins.kernels.spec import POINTERS, KernelSpec
from plugins.tactics import SPECS, Config, Tactic, config, grid_axes
from plugins.workspace import TORCH_DTYPES, Sizes, layout

Execute = Callable[[KernelSpec, Config, tuple[int, int, int], dict[str, Any]], None]


def launch(spec: KernelSpec, settings: Config, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
    """Launch one kernel on the device where its tensors are."""
    constants = dict(settings.constants)
    tensor = next(a for a in arguments.values() if isinstance(a, torch.Tensor))
    if tensor.is_cuda:
        spec.fn[grid](**arguments, **constants, num_warps=settings.num_warps, num_stages=settings.num_stages)
    else:
        interpreter.run(spec.fn, grid, {**arguments, **constants})


def launch_reference(spec: KernelSpec, settings: Config, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
    """The same step through the kernel's PyTorch reference (CPU tensors)."""
    extra = {"members": bool(dict(settings.constants)["MEMBERS"])} if spec.role.startswith("route") else {}
    spec.reference(**arguments, **extra)


def sizes_of(inputs: Mapping[str, torch.Tensor], top_k: int) -> Sizes:
    """Read and check the sizes from the operator's inputs (names of plugins/contract.py, x [T, D]). Raises `ValueError`."""
    x = inputs["x"]
    if x.ndim != 2 or x.shape[1] % 16:
        raise ValueError(f"x must be [T, D] with D a multiple of 16, got {tuple(x.shape)}")
    offsets = inputs["offsets"].cpu()
    experts = inputs["router"].shape[0]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must lie in 1..{experts} (number of experts), got {top_k}")
    expected = {
        "router": (experts, x.shape[1]),
        "router_bias": (experts,),
        "w_up": (inputs["b_up"].shape[0], x.shape[1]),
        "w_down": (inputs["b_up"].shape[0], x.shape[1]),
        "b_out": (experts, x.shape[1]),
        "offsets": (experts + 1,),
    }
    for name, shape in expected.items():
        if tuple(inputs[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(inputs[name].shape)}")
    for name in ("x", *expected, "b_up", "neurons"):
        want = x.dtype if POINTERS[name] == "T" else TORCH_DTYPES[POINTERS[name]]
        if inputs[name].dtype != want or not inputs[name].is_contiguous():
            raise ValueError(f"{name} must be contiguous {want}, got {inputs[name].dtype}")
    width = int((offsets[1:] - offsets[:-1]).max())
    return Sizes(x.shape[0], x.shape[1], experts, inputs["b_up"].shape[0], width, top_k)


def sm_of(tensor: torch.Tensor) -> int | None:
    """Architecture of the device that holds the tensor, such as 87; None for the CPU."""
    if not tensor.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


class Step(NamedTuple):
    """One launch with what follows from the sizes alone."""

    spec: KernelSpec
    settings: Config
    grid: tuple[int, int, int]


@lru_cache(maxsize=1024)
def steps(tactic: Tactic, sizes: Sizes, dtype: str, sm: int | None, by_load: bool = False) -> tuple[Step, ...]:
    """The launches of a tactic in order. `by_load` takes the build phase's `route_load` in the place of `route`."""
    found = []
    for step in tactic.launches:
        if step.role == "combine" and sizes.top_k == 1:
            continue
        role = "route_load" if step.role == "route" and by_load else step.role
        spec = SPECS[role]
        settings = config(role, step.variant, dtype, sm)
        shaped = KernelSpec(role, spec.fn, spec.reference, grid_axes(role, settings))
        found.append(Step(spec, settings, shaped.launch_grid(sizes.as_dict(), settings.block)))
    return tuple(found)


def run(
    tactic: Tactic, inputs: Mapping[str, torch.Tensor], *, activation: int = 0, top_k: int = 1,
    load_cdf: torch.Tensor | None = None, memory: torch.Tensor | None = None, y: torch.Tensor | None = None,
    execute: Execute = launch, watch: interpreter.Watch | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """Run `tactic` on the operator's `inputs`, whose shapes are checked; returns (y [T, D], workspace buffers by name).

    `load_cdf` [K] int32 switches to the build phase's `route_load`. `memory` (uint8) is the workspace and `y` the
    output; both are made if not given. `watch` observes the interpreter. The host waits for `offsets`, to learn the widest
    expert. Raises ValueError if the tactic does not fit the sizes.
    """
    return run_sized(
        tactic, inputs, sizes_of(inputs, top_k), activation=activation, load_cdf=load_cdf, memory=memory, y=y,
        execute=execute, watch=watch,
    )  # fmt: skip


def run_sized(
    tactic: Tactic, inputs: Mapping[str, torch.Tensor], sizes: Sizes, *, activation: int = 0,
    load_cdf: torch.Tensor | None = None, memory: torch.Tensor | None = None, y: torch.Tensor | None = None,
    execute: Execute = launch, watch: interpreter.Watch | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """`run` for sizes that are known and right: nothing here waits for the device, so that a CUDA graph may record it. Raises
    `ValueError` for an unknown activation, and for sizes that the tactic does not serve."""
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(f"activation must be an index into {ACTIVATIONS}, got {activation}")
    x = inputs["x"]
    if not tactic.fits(sizes.tokens, sizes.dim, sizes.top_k):
        raise ValueError(f"tactic {tactic.name} does not serve T={sizes.tokens}, D={sizes.dim}, top_k={sizes.top_k}")
    dtype = str(x.dtype).removeprefix("torch.")
    space = layout(sizes, dtype, tactic.kind)
    memory = torch.empty(space.size, dtype=torch.uint8, device=x.device) if memory is None else memory
    y = torch.empty_like(x) if y is None else y
    memory[: space.zeroed] = 0
    buffers = space.split(memory)
    available: dict[str, Any] = {**inputs, **buffers, "y": y, **sizes.as_dict(), "activation": activation}
    # Kernels that route by themselves take both ways; the one that is not asked for reads nothing, but its type must be right.
    available |= {"by_load": int(load_cdf is not None), "load_cdf": inputs["neurons"] if load_cdf is None else load_cdf}
    if watch is not None:
        watch.allow({n: v for n, v in available.items() if isinstance(v, torch.Tensor)})

    for spec, settings, grid in steps(tactic, sizes, dtype, sm_of(x), load_cdf is not None):
        # A buffer that this case does not use is passed as an empty stand-in, as the plugin passes null.
        arguments = {a: available.get(a, y) for a in spec.arguments}
        with interpreter.watching(watch) if watch is not None else nullcontext():
            execute(spec, settings, grid, arguments)
    return y, buffers
