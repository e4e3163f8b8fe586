"""Near ties between experts: where float32 sums in another order take another expert than float64, and neither is wrong.

One such token changes its image's output by far more than rounding does. So the float64 model is run again with the experts that
the runtime took. If each of them was the best of its own token within rounding, and the runtime then follows the float64 run, the
flips are ties and nothing else differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from exporter.parity.arithmetic import apply_layer
from exporter.parity.layers import LayerParity, wrong_routes
from exporter.parity.outputs import BatchError
from exporter.parity.stats import error_stats, within
from exporter.parity.taps import Tap
from moee.interface.watch import watched
from moee.layers.routed import RoutedLayer, routed_layers


@contextmanager
def dictated(model: nn.Module, routes: Sequence[Tensor]) -> Iterator[None]:
    """Within it, the model's routed layers take these experts [T, k], in the order of the layers, instead of their own."""

    def hook(route: Tensor):
        def apply(module: RoutedLayer, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = args[0].movedim(1, -1) if module.channels_first else args[0]
            result = apply_layer(module, x.reshape(-1, x.shape[-1]), route).reshape(x.shape).to(y.dtype)
            return result.movedim(-1, 1) if module.channels_first else result

        return apply

    layers = routed_layers(model).values()
    handles = [layer.register_forward_hook(hook(r)) for layer, r in zip(layers, routes, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_own_error(exact: nn.Module, own: nn.Module, x: Tensor, ties: bool) -> tuple[np.ndarray, float]:
    """Output of the float64 model `exact` on a batch, and the largest error of `own` there; with `ties` taken out.

    Otherwise a tie that torch itself breaks the other way would widen every tolerance that is made from this error.
    """
    if not ties:
        reference = exact(x).numpy()
        return reference, error_stats(own(x).float().numpy(), reference).max_abs_error
    with _chosen(exact) as best, _chosen(own) as taken:
        reference, result = exact(x).numpy(), own(x).float().numpy()
    followed = reference
    if any((a != b).any() for a, b in zip(best.values(), taken.values(), strict=True)):
        with dictated(exact, [*taken.values()]):
            followed = exact(x).numpy()
    return reference, error_stats(result, followed).max_abs_error


@contextmanager
def _chosen(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The experts [T, k] that each routed layer takes in a forward pass, in the order of the layers."""
    layers = routed_layers(model)
    routes = {name: torch.empty(0) for name in layers}
    with watched(model, layers, lambda name, x: routes.__setitem__(name, layers[name].routes(x))):
        yield routes


def only_ties(judged: Sequence[LayerParity]) -> bool:
    """Whether layers that were judged on the runtime's own routes leave nothing but ties to explain their flips."""
    return bool(judged) and all(layer.wrong_routes == 0 and within(layer.input_drift, layer.input_tolerance) for layer in judged)


def excuse_ties(
    error: BatchError, got: np.ndarray, reference: np.ndarray, exact: nn.Module, x: Tensor, *, taps: dict[str, Tap]
) -> BatchError:
    """The errors of a batch; images that are off are held against the float64 run with the runtime's routes, if that is nearer.

    `taps` are the runtime's on the batch `x`, in the order of the layers of `exact`. Nothing changes if one of its routes is
    wrong by more than rounding.
    """
    layers = routed_layers(exact).values()
    for layer, tap in zip(layers, taps.values(), strict=True):
        if (wrong_routes(layer, tap.tokens, tap.route) > 0).any():
            return error
    with dictated(exact, [tap.route for tap in taps.values()]):
        followed = exact(x).numpy()
    off = [np.abs(got - r).reshape(len(got), -1).max(1) for r in (reference, followed)]
    tied = (off[0] > error.tolerance_abs) & (off[1] < off[0])
    if not tied.any():
        return error
    stats = error_stats(got, np.where(tied.reshape(-1, *[1] * (got.ndim - 1)), followed, reference))
    return replace(
        error, max_abs_error=stats.max_abs_error, mean_abs_error=stats.mean_abs_error, p99_abs_error=stats.p99_abs_error,
        max_rel_error=stats.max_rel_error, mean_rel_error=stats.mean_rel_error, p99_rel_error=stats.p99_rel_error,
        tie_images=int(tied.sum()),
    )  # fmt: skip
