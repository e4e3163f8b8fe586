"""What two rules of this project choose, against what is measured: the tactic for a size, and training under a mask.

Both rules are stated and not measured (`plugins.tactics.default_tactic`, `moee.layers.routed.mask_pays`). A rule that chooses
something slower is no failure; `regret` says by how much, and the rule is then to be changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moee.layers.routed import Experts, RoutedFFN, mask_pays
from plugins import dispatch
from plugins.tactics import TACTICS, default_tactic
from plugins.workspace import Sizes
from tests.gpu.timing import in_turn, recorded, summary, title

# (name, D, H, tokens an image)
MODELS = (("dinov2-s", 384, 1536, 257), ("DeiT-B", 768, 3072, 197))
EXPERTS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    models, batches = (MODELS, (1, 8, 32)) if device.type == "cuda" else ((("tiny", 32, 64, 9),), (1,))
    checks = []
    for name, dim, hidden, tokens in models:
        for batch in batches:
            checks.append({"name": f"tactics, {name}, batch {batch}", **tactics(dim, hidden, batch * tokens, device)})
        for share in (0.25, 0.5, 0.8):
            row = training(dim, hidden, batches[-1] * tokens, share, device)
            checks.append({"name": f"a training step, {name}, experts of {share:.0%}", **row})
        body = {"passed": all(check["passed"] for check in checks), "checks": checks, "device": title(device)}
        args.out.write_text(json.dumps(body, indent=1), encoding="utf-8")
        print(checks[-1], flush=True)
    return 0


def layer_of(dim: int, hidden: int, width: int, device: torch.device) -> RoutedFFN:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    kept = [torch.randperm(hidden, generator=g)[:width].sort().values for _ in range(EXPERTS)]
    offsets = torch.arange(0, (EXPERTS + 1) * width, width).int()
    weights = (normal(EXPERTS, dim), torch.zeros(EXPERTS), normal(hidden, dim), torch.zeros(hidden), normal(hidden, dim))
    return RoutedFFN(Experts(*weights, torch.zeros(EXPERTS, dim), torch.cat(kept).int(), offsets, "gelu")).to(device)


@torch.no_grad()
def tactics(dim: int, hidden: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Times of every tactic that fits, in float16, and of the dense products; how much slower the rule's is than the fastest."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    layer = layer_of(dim, hidden, hidden // 2, device).to(dtype)
    x = torch.randn(tokens, dim, device=device, dtype=dtype)
    names = ("router", "w_up", "b_up", "w_down", "b_out", "neurons", "offsets")
    inputs = {"x": x, "router_bias": layer.router_bias.float(), **{name: getattr(layer, name).detach() for name in names}}
    sizes = Sizes(tokens, dim, EXPERTS, hidden, hidden // 2)

    def dense() -> Tensor:
        return torch.nn.functional.gelu(x @ inputs["w_up"].T) @ inputs["w_down"]

    calls = {"dense": recorded(dense, device)[0]}
    results = {}
    for tactic in (t for t in TACTICS if t.fits(tokens, dim, 1)):
        run = partial(dispatch.run_sized, tactic, inputs, sizes)
        calls[tactic.name], results[tactic.name] = recorded(lambda run=run: run()[0], device)
    chosen = default_tactic(tokens, dim, 1, EXPERTS, str(dtype).removeprefix("torch.")).name
    want = results[chosen]
    near = {name: float(((y - want).abs() <= 0.02 * want.abs().max()).float().mean()) for name, y in results.items()}
    found = summary(in_turn(calls, device, 200, 1.0), "dense")
    best = min(results, key=lambda name: found[name]["p50_ms"])
    return {
        "passed": min(near.values()) > 0.99, "rule": chosen, "fastest": best, "times": found,
        "regret": round(found[chosen]["p50_ms"] / found[best]["p50_ms"], 3),
    }  # fmt: skip


def training(dim: int, hidden: int, tokens: int, share: float, device: torch.device) -> dict[str, Any]:
    """Times of a step, forward and backward, on masked products and expert by expert, float32 under float16 autocast on a GPU."""
    layer = layer_of(dim, hidden, round(share * hidden / 16) * 16, device)
    x = torch.randn(tokens, dim, device=device, requires_grad=True)
    with torch.no_grad():
        chosen = layer.routes(x)

    def step(way: str) -> Tensor:
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            y = getattr(layer, way)(x, chosen)
        return torch.autograd.grad(y.float().square().sum(), (x, *layer.store.weights))[0]

    masked, grouped = step("_masked"), step("_grouped")
    alike = float(torch.nn.functional.cosine_similarity(masked.double(), grouped.double()).mean())
    ways = {"masked": partial(step, "_masked"), "grouped": partial(step, "_grouped")}
    found = summary(in_turn(ways, device, 30, 1.5), "grouped")
    pays = mask_pays("cuda", True, tokens=tokens / EXPERTS, share=share)
    rule, fastest = "masked" if pays else "grouped", min(found, key=lambda name: found[name]["p50_ms"])
    regret = round(found[rule]["p50_ms"] / found[fastest]["p50_ms"], 3)
    return {"passed": alike > 0.99, "rule": rule, "fastest": fastest, "regret": regret, "times": found}


if __name__ == "__main__":
    sys.exit(main())
