"""Second pass of CLEAR-MoE: layers built front to back on the inputs that the converted ones before them really produce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import CHUNK, as_tokens
from moee.cures import cures
from moee.errors import UserError
from moee.layers.activations import activate
from moee.layers.clear import ClearFFN, ClearParts
from moee.layers.report import RefitReport
from moee.methods.clear_moe.analysis import Analysis
from moee.methods.clear_moe.decompose import (
    decompose_down,
    decompose_up,
    dense_hidden,
    refit_down,
    up_metric,
)
from moee.methods.clear_moe.options import ClearOptions
from moee.mlps.sites import put_mlp, restore_mlp
from moee.parallel.devices import CPU, placed
from moee.progress import Reporter


class _BuildStep(nn.Module):
    """Stands where a layer will be for one forward pass: builds it on the pass's own input, then applies it."""

    def __init__(self, analysis: Analysis, config: ClearOptions, done):
        super().__init__()
        self.analysis, self.config, self.done = analysis, config, done
        self.built: Built | None = None

    def forward(self, x: Tensor) -> Tensor:
        ffn = self.analysis.ffn
        tokens = as_tokens(x, ffn.channels_first).cpu()
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(self.config.seed))[: self.config.tokens]
        self.built = build_layer(self.analysis, tokens[order.sort().values], self.config)
        self.done()
        per_image = max(1, len(tokens) // len(x))
        layer = self.built.layer.to(x.device)
        return torch.cat([layer(part) for part in x.split(max(1, CHUNK // per_image))])


@dataclass(frozen=True)
class Built:
    """A layer, each expert's share of the tokens that it was made from, what the refit did."""

    layer: ClearFFN
    share: list[float]
    tokens: int
    refit: RefitReport | None


def build_layer(a: Analysis, tokens: Tensor, config: ClearOptions) -> Built:
    """A layer from its input tokens [N, D]. Raises `UserError` for NaN or infinite ones."""
    assert a.ranks is not None, "only layers with ranks are built"
    r1, q1, r2, q2 = a.ranks
    ffn, k = a.ffn, config.experts
    if not torch.isfinite(tokens).all():
        raise UserError(
            f"`{ffn.name}` receives NaN or infinite activations from the layers converted before it; "
            + cures(
                "raise --rank", "raise --energy", "skip one of those layers with --exclude", elsewhere="choose another method"
            )
        )
    routes = a.router.route(tokens)
    up = decompose_up(ffn, tokens, routes, k, r1, residual=q1, metric=up_metric(ffn, tokens, config.metric))
    hidden = _hidden(up, tokens, routes, ffn.activation)
    target = dense_hidden(ffn, tokens) @ ffn.w_down.T
    weight, refit = ffn.w_down, None
    if config.compensation == "refit":
        weight, refit = refit_down(ffn, hidden, target, routes, k, ridge=config.refit_lambda)
    down = decompose_down(ffn, hidden, target, routes, k, rank=r2, residual=q2, weight=weight)
    share = torch.bincount(routes, minlength=k).double() / len(routes)
    layer = ClearFFN(ClearParts(a.router, up, down, ffn.activation), ffn.channels_first).eval()
    return Built(layer, share.tolist(), len(tokens), refit)


def _hidden(up, tokens: Tensor, routes: Tensor, activation: str) -> Tensor:
    """Hidden activations [N, H] of the decomposed up map."""
    hidden = up.shared(tokens) + up.bias[routes]
    for e in range(len(up.bias)) if up.residual else ():
        mine = (routes == e).nonzero()[:, 0]
        hidden[mine] += (tokens[mine] @ up.expert_in[e].T) @ up.expert_out[e]
    return activate(hidden, activation)


def build_layers(
    model: nn.Module, selected: list[Analysis], images: Tensor, config: ClearOptions, report: Reporter,
    *, device: torch.device = CPU,
) -> dict[str, Built]:  # fmt: skip
    """Put the layers in place, front to back, in one forward pass on `device`; an error puts the dense ones back."""
    dense: dict[str, nn.Module] = {}
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        report("decompose", done, len(selected))

    steps = {a.ffn.name: _BuildStep(a, config, count) for a in selected}
    for a in selected:
        dense |= put_mlp(model, a.ffn.name, steps[a.ffn.name], a.ffn.bypassed)
    try:
        report("decompose", 0, len(selected))
        with placed(model, device):
            model(images.to(device))
    except BaseException:
        restore_mlp(model, dense)
        raise
    built = {}
    for name, step in steps.items():
        assert step.built is not None, f"the forward pass does not run `{name}`"
        put_mlp(model, name, step.built.layer.to("cpu"), step.analysis.ffn.bypassed)
        built[name] = step.built
    return built
