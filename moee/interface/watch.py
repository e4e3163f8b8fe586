"""What the modules of a model are given: watched while it runs, or found from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moee.errors import UserError
from moee.interface.adapted import on_meta

See = Callable[[str, Tensor], object]


@contextmanager
def watched(model: nn.Module, names: Iterable[str], see: See) -> Iterator[None]:
    """A block in which `see` is called with the name and the input of each named module, as often as one is about to run."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def call(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(name, args[0])

        return call

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shapes_given(model: nn.Module, names: Iterable[str], image: tuple[int, int, int]) -> dict[str, torch.Size]:
    """Shape of what each named module is given of one image [C, H, W], in the order in which they run. Works on shapes alone;
    raises `UserError` for a model that does not."""
    shapes: dict[str, torch.Size] = {}
    shadow = on_meta(model)
    with watched(shadow, names, lambda name, x: shapes.__setitem__(name, x.shape)), torch.no_grad():
        try:
            shadow(torch.empty(1, *image, device="meta"))
        except Exception as error:  # a stranger's forward
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"the model does not run on shapes alone ({reason}); its forward must use no tensors but its own parameters and "
                "buffers"
            ) from error
    return shapes
