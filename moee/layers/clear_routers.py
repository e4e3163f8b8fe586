"""Routers: which expert a token goes to. Trained on cluster labels; all but `random` learn where the clusters lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moee.layers.routing import exact_arithmetic, random_router, route, scores

HELD_OUT = 0.2  # of the labelled tokens, for the router's accuracy
PENALTY = 1e-4  # on the squared weights of the trained routers, inputs standardised
LINEAR_STEPS = 60
MLP_STEPS, MLP_BATCH, MLP_RATE = 200, 512, 3e-3


@dataclass(frozen=True)
class Router:
    """`rows` [K, F] and `bias` [K] score features; features are the tokens [T, D] themselves or, for the two-layer router,
    relu(tokens @ hidden.T + hidden_bias) with `hidden` [F, D] (zero rows: none)."""

    rows: Tensor
    bias: Tensor
    hidden: Tensor
    hidden_bias: Tensor

    @property
    def experts(self) -> int:
        return len(self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token."""
        return self.rows.numel() + self.hidden.numel()

    def features(self, tokens: Tensor) -> Tensor:
        """What is scored [T, F]: float32 from half-precision tokens and under autocast, as scores are."""
        if not len(self.hidden):
            return tokens
        exact = torch.promote_types(tokens.dtype, torch.float32)
        with exact_arithmetic(tokens.device):
            return torch.relu(torch.addmm(self.hidden_bias.to(exact), tokens.to(exact), self.hidden.to(exact).T))

    def scores(self, tokens: Tensor) -> Tensor:
        """Scores [T, K] float32; zero everywhere for a token whose scores are not all finite."""
        return scores(self.features(tokens), self.rows, self.bias)

    def route(self, tokens: Tensor) -> Tensor:
        """Expert [T] int64 of each token, ties to the lowest id."""
        return route(self.features(tokens), self.rows, self.bias)[:, 0]


def linear_parts(rows: Tensor, bias: Tensor, dim: int) -> Router:
    """A router that scores the tokens [T, dim] themselves."""
    return Router(rows.float(), bias.float(), torch.zeros(0, dim), torch.zeros(0))


def centroid_router(tokens: Tensor, labels: Tensor, experts: int) -> Router:
    """Nearest mean of the clusters `labels` [N] of tokens [N, D]: argmin |x - m|^2 = argmax x.m - |m|^2 / 2."""
    means = torch.stack([tokens[labels == e].double().mean(0) for e in range(experts)])
    return linear_parts(means, -means.square().sum(1) / 2, tokens.shape[1])


def _standardise(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens.mean(0), tokens.std(0).clamp(min=1e-6)


def linear_router(tokens: Tensor, labels: Tensor, experts: int) -> Router:
    """Multinomial logistic regression of `labels` [N] on standardised tokens [N, D], folded back into rows and biases."""
    mean, deviation = _standardise(tokens)
    x = (tokens - mean) / deviation
    weight = torch.zeros(experts, x.shape[1], requires_grad=True)
    bias = torch.zeros(experts, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=LINEAR_STEPS, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, labels) + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    rows = weight.detach() / deviation
    return linear_parts(rows, bias.detach() - rows @ mean, tokens.shape[1])


def mlp_router(tokens: Tensor, labels: Tensor, experts: int, width: int, seed: int) -> Router:
    """Two layers with ReLU between, `width` wide, trained by AdamW to give `labels` [N] on standardised tokens [N, D]; the first
    layer takes the standardising up."""
    mean, deviation = _standardise(tokens)
    x = (tokens - mean) / deviation
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(width, x.shape[1], generator=generator) * (2 / x.shape[1]) ** 0.5
    second = torch.randn(experts, width, generator=generator) * width**-0.5
    parts = [p.requires_grad_() for p in (first, torch.zeros(width), second, torch.zeros(experts))]
    optimiser = torch.optim.AdamW(parts, lr=MLP_RATE, weight_decay=PENALTY)
    with torch.enable_grad():
        for _ in range(MLP_STEPS):
            rows = torch.randint(len(x), (MLP_BATCH,), generator=generator)
            hidden = torch.relu(x[rows] @ parts[0].T + parts[1])
            loss = nn.functional.cross_entropy(hidden @ parts[2].T + parts[3], labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    w, b, rows, bias = (p.detach() for p in parts)
    folded = w / deviation
    return Router(rows, bias, folded, b - folded @ mean)


def fit_router(
    kind: str, tokens: Tensor, labels: Tensor, experts: int, width: int = 32, *, seed: int = 0
) -> tuple[Router, float]:
    """A router by name for tokens [N, D] with cluster labels [N], and its accuracy on a fifth of them, held out.

    kind: linear, mlp, centroid or random (which looks at no label). Raises `ValueError` for another.
    """
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    held_out, train = order[: max(1, round(len(order) * HELD_OUT))], order[max(1, round(len(order) * HELD_OUT)) :]
    if len(labels[train].unique()) < experts:  # too few tokens to hold any out
        train = order
    x, y = tokens[train], labels[train]
    if kind == "linear":
        router = linear_router(x, y, experts)
    elif kind == "mlp":
        router = mlp_router(x, y, experts, width, seed)
    elif kind == "centroid":
        router = centroid_router(x, y, experts)
    elif kind == "random":
        router = linear_parts(*random_router(tokens, experts, seed), tokens.shape[1])
    else:
        raise ValueError(f"unknown router {kind!r}; expected linear, mlp, centroid or random")
    return router, float((router.route(tokens[held_out]) == labels[held_out]).double().mean())
