"""A device that is not there: tensors that lie in this machine's memory and claim to lie on `DEVICE`.

Within `StandIn` they may meet what a GPU's tensors may meet, and nothing else: an operation on tensors of two devices, or a
generator of the CPU for random numbers on the device, raises as it would on a GPU. The arithmetic is the CPU's, so that results
can be compared to the bit. `waits` counts what a GPU's host would wait for: values, and sizes that depend on them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import moee.layers.ops
import moee.mlps.gated

DEVICE = torch.device("meta", 1)  # PyTorch's own tensors without memory have no number
MOVES = {"aten._to_copy.default", "aten.copy_.default"}
# a GPU's tensor may be indexed by one of the CPU
INDEXED = {"aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default", "aten._index_put_impl_.default"}
# operations that give the host a value, or a tensor whose size is one
WAITING = {
    "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.bincount.default", "aten.equal.default",
    "aten.masked_select.default", "aten._unique2.default", "aten.unique_dim.default", "aten.is_nonzero.default",
}  # fmt: skip
OURS = {
    "moee.experts.default": moee.layers.ops.experts, "moee.experts_backward.default": moee.layers.ops.experts_backward,
    "moee.ffn.default": moee.layers.ops.ffn, "moee.gated_ffn.default": moee.mlps.gated.gated_ffn,
}  # fmt: skip


def autocast_enabled(kind: str = "cpu", known: Any = torch.is_autocast_enabled) -> bool:
    """`torch.is_autocast_enabled`, which does not know the device."""
    return kind != DEVICE.type and known(kind)


class Placed(Tensor):
    """A tensor on the device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Placed:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Placed) -> None:
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the stand-in")


class StandIn(TorchDispatchMode):
    """Within it `DEVICE` exists; `counts` says how often each operation ran there, `waits` which of them a host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, device = str(func), kwargs.get("device")
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        here = [t for t in tensors if isinstance(t, Placed)]
        if not here and device != DEVICE:
            return func(*args, **kwargs)
        with self:  # operations that consist of others come whole in inference mode
            parts = func.decompose(*args, **kwargs) if name not in OURS else NotImplemented
        if parts is not NotImplemented:
            return parts
        self.counts[name] += 1
        if _waits(name, args, kwargs):
            self.waits[name] += 1
        if name in OURS:  # what it does inside is looked at, too
            with self:
                return OURS[name]._init_fn(*args, **kwargs)
        self._check(name, args, tensors)
        if kwargs.get("generator") is not None and (device == DEVICE or here):
            raise RuntimeError(f"{name}: expected a generator of {DEVICE}, came one of the CPU")
        to_device = device == DEVICE or (bool(here) and device is None and (name not in MOVES or isinstance(args[0], Placed)))
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        with torch.inference_mode(False):  # or a view of a parameter would be of another kind than the parameter
            result = func(*inner_args, **inner_kwargs)
        own = {id(t.inner): t for t in here}  # what was changed in place is the same tensor

        def outer(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in own:
                return own[id(value)]
            return Placed(value) if to_device else value

        with torch.inference_mode(False):
            return tree_map(outer, result)

    def _check(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        """Raise for an operation on tensors of two devices."""
        elsewhere = [t for t in tensors if not isinstance(t, Placed) and t.dim() > 0]
        if name in MOVES or not elsewhere:
            return
        if name in INDEXED and isinstance(args[0], Placed) and all(isinstance(t, Placed) for t in args[2:3]):
            return
        shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, came {shapes}")


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name in MOVES:  # `copy_` names its target, the other its device
        source = args[1] if name == "aten.copy_.default" else args[0]
        here = isinstance(args[0], Placed) if name == "aten.copy_.default" else kwargs.get("device") in (None, DEVICE)
        return isinstance(source, Placed) and not here
    if name == "aten.repeat_interleave.Tensor":
        return kwargs.get("output_size") is None
    masks = [t for t in args[1] if t is not None and t.dtype == torch.bool] if name in INDEXED else []
    return name in WAITING or bool(masks)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Placed) else value
