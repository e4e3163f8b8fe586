"""Whole models: dense against experts and against static pruning, each compiled and replayed as a CUDA graph, in float16.

Weights are random, for nothing can be downloaded; the routers are cluster means of the model's own tokens, and the share of the
busiest expert is recorded. Widths are about those of `--preset deploy`: four experts of half the hidden neurons, 80 % in use.
Nothing is timed before its tokens agree with those of the plain form, which for experts is the loop over them.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import plugins.pytorch
from moee.clustering.lloyd import lloyd
from moee.layers import ops
from moee.layers.routed import Experts, RoutedFFN
from moee.layers.routing import make_router
from tests.gpu.timing import in_turn, recorded, summary, title

EXPERTS, WIDTH, UNION = 4, 0.5, 0.8  # of the hidden neurons
# A token agrees if its cosine is above the first; of all tokens at least the second must, for near ties may be routed otherwise.
COSINE, AGREE = 0.999, 0.95


@dataclass(frozen=True)
class Case:
    """A timm model with further arguments, the size of its images, batches, rounds."""

    name: str
    size: int
    batches: tuple[int, ...]
    arguments: tuple[tuple[str, int], ...] = ()
    runs: int = 200
    seconds: float = 2.0


CASES = (
    Case("vit_small_patch14_dinov2", 224, (1, 8, 32, 128)),  # 257 tokens
    Case("deit_base_patch16_224", 224, (1, 8, 32, 128)),
)
TINY = (Case("test_vit", 32, (1,), (("depth", 2),), runs=1),)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    plugins.pytorch.register()
    if device.type == "cpu":  # the same way by the interpreter
        ops.provide("cpu", plugins.pytorch.routed_ffn)
    else:
        torch._dynamo.config.recompile_limit = 64  # one a model and batch; beyond it a model would silently run uncompiled
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    checks: list[dict[str, Any]] = []
    for row in rows(CASES if device.type == "cuda" else TINY, device):
        checks.append(row)
        body = {"passed": all(c["passed"] for c in checks), "checks": checks, "device": title(device), "precision": "fp16"}
        args.out.write_text(json.dumps(body, indent=1), encoding="utf-8")
        print(row, flush=True)
    return 0


@torch.no_grad()
def rows(cases: tuple[Case, ...], device: torch.device) -> Iterator[dict[str, Any]]:
    """One result a model and batch: whether the outputs agree, and the times."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    for case in cases:
        torch.manual_seed(0)
        dense = plain_model(case).to(device, dtype)
        image = torch.randn(max(case.batches), 3, case.size, case.size, device=device, dtype=dtype)
        moee, static = routed(dense, image[:16]), narrow(dense)
        models = {"dense": dense, "moee": moee, "static": static}
        macs = {name: _macs(models[name], image[:1]) for name in ("dense", "static")}
        for batch in case.batches:
            yield {
                "name": f"{case.name}, batch {batch}", "model": case.name, "batch": batch,
                "ideal_ratio": round(macs["dense"] / macs["static"], 4), "shares": shares(moee, image[:batch]),
                **timed(models, image[:batch].clone(), case),
            }  # fmt: skip


def plain_model(case: Case) -> nn.Module:
    """The dense model, giving tokens [B, N, D]. Its MLPs are made to matter: drawn small, they could be wrong unseen."""
    model = timm.create_model(case.name, img_size=case.size, num_classes=0, global_pool="", **dict(case.arguments)).eval()
    for block in model.blocks:  # type: ignore[union-attr]
        for name, parameter in block.named_parameters():
            if name.startswith("mlp.fc") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif name.endswith("gamma"):
                nn.init.ones_(parameter)
    return model


def timed(models: dict[str, nn.Module], images: Tensor, case: Case) -> dict[str, Any]:
    """Agreement of every way with its plain form, then the times of all that agree."""
    device = images.device
    plain = {name: model(images) for name, model in models.items() if name != "moee"}
    with ops.ffn.set_kernel_enabled(device.type, False):  # expert by expert
        plain["moee"] = models["moee"](images)
    calls, agreement = {}, {}
    for name, model in models.items():
        ways = {"": _compiled(model) if device.type == "cuda" else model}
        ways |= {" uncompiled": model} if name == "moee" else {}
        for way, run in ways.items():
            calls[name + way], y = recorded(lambda run=run: run(images), device)
            near = nn.functional.cosine_similarity(y.double(), plain[name].double(), dim=-1) > COSINE
            agreement[name + way] = round(float(near.double().mean()), 4)
    bad = sorted(name for name, share in agreement.items() if not share >= AGREE)
    head = {"passed": not bad, "agreement": agreement}
    if bad:
        return {**head, "reason": f"{', '.join(bad)}: tokens differ from those of the plain form; not timed"}
    return {**head, "times": summary(in_turn(calls, device, case.runs, case.seconds), "dense")}


def _compiled(model: nn.Module) -> nn.Module:
    """A copy that shares the weights, each block compiled: blocks of one shape share the compiled code."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.blocks = nn.Sequential(*(copy.copy(block) for block in model.blocks))  # type: ignore[arg-type, union-attr]
    for block in twin.blocks:
        block.compile(dynamic=False)
    return twin


def routed(dense: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose MLPs are four experts, routed by clusters of each layer's own tokens."""
    moee, generator = copy.deepcopy(dense), torch.Generator().manual_seed(0)
    for block in moee.blocks:  # type: ignore[union-attr]
        tokens: list[Tensor] = []
        handle = block.mlp.register_forward_pre_hook(lambda _, given, tokens=tokens: tokens.append(given[0]))
        moee(images)
        handle.remove()
        block.mlp = _experts(block.mlp, tokens[0].flatten(0, 1).float(), generator).to(images.device, images.dtype)
    return moee


def _experts(mlp: nn.Module, tokens: Tensor, generator: torch.Generator) -> RoutedFFN:
    w_up, b_up, w_down, b_out = (t.detach().float().cpu() for t in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias))
    hidden = len(w_up)
    union, width = (round(part * hidden / 16) * 16 for part in (UNION, WIDTH))
    router, bias = make_router("cosine", tokens.cpu(), lloyd(tokens, EXPERTS, 0), EXPERTS)
    kept = [torch.randperm(union, generator=generator)[:width].sort().values for _ in range(EXPERTS)]
    return RoutedFFN(Experts(
        router, bias, w_up[:union], b_up[:union], w_down.T[:union].contiguous(), b_out.expand(EXPERTS, -1),
        torch.cat(kept).int(), torch.arange(0, (EXPERTS + 1) * width, width).int(), "gelu",
    ))  # fmt: skip


def narrow(dense: nn.Module) -> nn.Module:
    """A copy whose MLPs have one expert's width: structured pruning of equal multiplications."""
    static = copy.deepcopy(dense)
    for block in static.blocks:  # type: ignore[union-attr]
        mlp, width = block.mlp, round(WIDTH * block.mlp.fc1.out_features / 16) * 16
        mlp.fc1.weight, mlp.fc1.bias = nn.Parameter(mlp.fc1.weight[:width].clone()), nn.Parameter(mlp.fc1.bias[:width].clone())
        mlp.fc2.weight = nn.Parameter(mlp.fc2.weight[:, :width].clone())
        mlp.fc1.out_features = mlp.fc2.in_features = width
    return static


def shares(moee: nn.Module, images: Tensor) -> list[float]:
    """The share of tokens of the busiest expert, a layer."""
    busiest: list[float] = []

    def look(layer: RoutedFFN, given: tuple[Tensor]) -> None:
        counts = torch.bincount(layer.routes(given[0])[:, 0], minlength=layer.num_experts)
        busiest.append(round(float(counts.max() / counts.sum()), 3))

    handles = [block.mlp.register_forward_pre_hook(look) for block in moee.blocks]  # type: ignore[union-attr]
    moee(images)
    for handle in handles:
        handle.remove()
    return busiest


def _macs(model: nn.Module, image: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2


if __name__ == "__main__":
    sys.exit(main())
