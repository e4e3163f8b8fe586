"""What a caller in Python may have set in torch for code of its own, and ours must not compute under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def own_arithmetic() -> Iterator[None]:
    """A block without the caller's autocast, default type and default device: calibration, refit and every measurement are in
    float32, and tensors are made on the CPU unless somebody says otherwise. Afterwards all is as it was."""
    import torch  # the command line's help does without

    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        before = torch.get_default_dtype()
        if before is not torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
