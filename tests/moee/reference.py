"""The routed FFN in the plainest form: a loop over tokens and experts in float64."""

import math

import torch


def act(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if kind == "relu":
        return x.clamp(min=0)
    slope = {"silu": 1.0, "quick_gelu": 1.702}[kind]
    return x / (1 + torch.exp(-slope * x))


def routed_ffn(x, router, router_bias, w_up, b_up, w_down, b_out, neurons, offsets, activation, top_k):
    """Every argument as in the operator's contract; returns y float64 and the routes of each token."""
    flat = x.reshape(-1, x.shape[-1]).double()
    rows, routes = [], []
    for token in flat:
        # scores in float32 like the contract: a tie or near tie must fall the same way
        scores = [float(torch.dot(token.float(), r.float()) + b) for r, b in zip(router, router_bias, strict=True)]
        if not all(math.isfinite(s) for s in scores):
            scores = [0.0] * len(scores)
        best = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:top_k]
        total = torch.zeros(x.shape[-1], dtype=torch.float64)
        for e in best:
            for j in neurons[int(offsets[e]) : int(offsets[e + 1])].tolist():
                hidden = act(torch.dot(token, w_up[j].double()) + b_up[j].double(), activation)
                total += hidden * w_down[j].double()
            total += b_out[e].double()
        rows.append(total)
        routes.append(best)
    return torch.stack(rows).reshape(x.shape), routes


def random_problem(tokens, dim, union, widths, seed=0, activation="gelu", top_k=1):
    """Arguments of `moee::ffn` with the given expert widths (a width may be 0)."""
    g = torch.Generator().manual_seed(seed)
    kept = [torch.randperm(union, generator=g)[:w].sort().values for w in widths]
    return dict(
        x=torch.randn(tokens, dim, generator=g),
        router=torch.nn.functional.normalize(torch.randn(len(widths), dim, generator=g), dim=1),
        router_bias=torch.randn(len(widths), generator=g) * 0.1,
        w_up=torch.randn(union, dim, generator=g) / dim**0.5,
        b_up=torch.randn(union, generator=g) * 0.1,
        w_down=torch.randn(union, dim, generator=g) / union**0.5,
        b_out=torch.randn(len(widths), dim, generator=g) * 0.1,
        neurons=torch.cat(kept).to(torch.int32),
        offsets=torch.tensor([0, *widths]).cumsum(0).to(torch.int32),
        activation=activation,
        top_k=top_k,
    )
