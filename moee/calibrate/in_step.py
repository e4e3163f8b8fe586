"""Forward passes over parts of the images, side by side: each waits at every layer that is made from what all of them bring.

A pass runs in a thread of its own, but only one runs at a time, so a model needs to know nothing of it. Modules must not keep
what they were given of one image until a later one of them runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moee.cures import without
from moee.errors import StepFailed
from moee.space.machine import give_back


class _Ended(BaseException):
    """Ends a pass of which nothing more is needed."""


class WaitingStep(nn.Module):
    """Stands where a layer will be: a pass waits here until the layer has been made, then `apply` goes on."""

    ready = False

    def forward(self, x: Tensor, *more: object, **named: object) -> Tensor:
        assert all(value is None or value is False for value in (*more, *named.values())), "calibration images come without masks"
        if not self.ready:
            here = threading.current_thread()
            assert isinstance(here, Pass), "a step runs within passes alone"
            here.wait(self, x)
        return self.apply_to(x)

    def apply_to(self, x: Tensor) -> Tensor:
        """What the finished layer makes of its input."""
        raise NotImplementedError


class Pass(threading.Thread):
    """A forward pass that runs from one `advance` to the next. `at` is the step where it waits."""

    def __init__(self, work: Callable[[], object]):
        super().__init__(name="pass", daemon=True)
        self.work = work
        self.inference, self.grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.at: object = None
        self.x = self.beside = torch.empty(0)
        self.error: BaseException | None = None
        self.over = False

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.over:
                with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):  # both are a thread's own
                    self.work()
        except _Ended:
            pass
        except BaseException as error:  # the caller of `advance` raises it
            self.error = error
        self.at, self.over = None, True
        self.paused.release()

    def wait(self, step: object, x: Tensor) -> None:
        """In the pass: be at the step with what it is handed, and go on when it is told to."""
        self.at, self.x = step, x
        self.paused.release()
        self.go.acquire()
        self.x = self.beside = torch.empty(0)
        if self.over:
            raise _Ended

    def advance(self) -> None:
        """From outside: let it run to its next step, or to its end."""
        self.go.release()
        self.paused.acquire()


class InStep:
    """Passes over this rank's parts, as a context; leaving it ends them where they are."""

    def __init__(self, works: Sequence[Callable[[], object]]):
        self.passes = [Pass(work) for work in works]

    def __enter__(self) -> InStep:
        for one in self.passes:
            one.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for one in self.passes:
            one.over = True
            one.go.release()
            one.join()

    def bring(self, step: object, name: str) -> list[Pass]:
        """Every pass, once it has come to the step of the layer `name`: `x` is what it hands over there, `beside` what it noted
        on the way. The `ready` of a `WaitingStep` lets them go on. Raises the error of a
        pass, or `StepFailed` where the layer does not run in its turn."""
        for one in self.passes:
            one.advance()
            give_back()  # what a thread has freed the C library keeps for that thread, and the passes' shares would add up
            if one.error is not None:
                raise one.error
            if one.at != step:
                raise StepFailed(f"`{name}` runs out of turn or not at all for some images; {without(name)}")
        return self.passes
