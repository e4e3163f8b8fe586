"""PyTorch's operator `moee::ffn` on CUDA, by the plugin's kernels: the host never waits for the device.

    import plugins.pytorch
    plugins.pytorch.register()      # once a process; models that are on a GPU, now or later, take the kernels

`torch.compile` and CUDA graphs work through it: grids follow from shapes alone. As ever, call a model once before a graph records
it, so that Triton has compiled its kernels. What the kernels do not serve goes expert by expert, as without `register`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moee.layers import ops
from plugins import dispatch
from plugins.contract import ACTIVATIONS, DTYPES, INPUT_NAMES, INPUTS
from plugins.tactics import default_tactic
from plugins.workspace import TORCH_DTYPES, Sizes

TOKEN_TYPES = {TORCH_DTYPES[name]: name for name in DTYPES}
TYPED = tuple(given.name for given in INPUTS if given.dtype == "T")


def register() -> None:
    """Let routed layers on CUDA devices run by the kernels wherever no gradient is needed."""
    ops.provide("cuda", routed_ffn)


def routed_ffn(*arguments: Any, execute: dispatch.Execute = dispatch.launch) -> Tensor:
    """x [..., D] to y [..., D]; `arguments` in the order of `plugins.contract`, as `moee.layers.ops.ffn` takes them.

    The attribute `max_width` must be the widest expert's: `offsets` are on the device and are not read here. `execute` launches a
    kernel. Raises ValueError for shapes that do not fit one another.
    """
    ops.check_ffn(*arguments)
    inputs = dict(zip(INPUT_NAMES, arguments, strict=False))
    activation, top_k, max_width, _ = arguments[len(INPUT_NAMES) :]
    x = inputs["x"]
    if not _served(inputs, activation):
        return ops.ffn_by_groups(*arguments)
    if not x.numel():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    ready = {name: value.contiguous() for name, value in inputs.items()}
    ready |= {"x": ready["x"].view(-1, x.shape[-1]), "router_bias": ready["router_bias"].float()}
    experts, union = len(ready["router"]), len(ready["w_up"])
    sizes = Sizes(len(ready["x"]), x.shape[-1], experts, union, max_width, top_k)
    tactic = default_tactic(sizes.tokens, sizes.dim, top_k, experts, TOKEN_TYPES[x.dtype])
    with torch.cuda.device_of(x):  # Triton launches on the current device
        y, _ = dispatch.run_sized(tactic, ready, sizes, activation=ACTIVATIONS.index(activation), execute=execute)
    return y.view(x.shape)


def _served(inputs: dict[str, Tensor], activation: str) -> bool:
    """Whether the kernels take these types and this width."""
    x = inputs["x"]
    alike = all(inputs[name].dtype == x.dtype for name in TYPED)
    indices = all(inputs[name].dtype == torch.int32 for name in ("neurons", "offsets"))
    return x.dtype in TOKEN_TYPES and alike and indices and x.shape[-1] % 16 == 0 and activation in ACTIVATIONS
