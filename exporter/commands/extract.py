"""`moee extract`: find experts in a dense model's MLPs."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.commands import OK, add_out
from exporter.ui import ProgressDisplay, layer_table, stage_table
from moee.config import PRESETS

TEXT = "find experts in a dense model's MLPs"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("extract", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    sub.add_argument("model", help="timm model name, dinov2-s or vit-scratch")
    sub.add_argument("--data", required=True, help="digits, photos, photos:N, an image folder or a timm.data dataset string")
    sub.add_argument("--pretrained", action="store_true", help="timm's pretrained weights")
    sub.add_argument("--weights", help="weights as a .safetensors file")
    sub.add_argument("--img-size", type=int, help="input size in pixels, for models that take it")
    sub.add_argument("--preset", default="compensated", help=f"one of {', '.join(PRESETS)}")
    sub.add_argument("--exclude", action="append", default=[], metavar="LAYER", help="leave this MLP or block dense; repeatable")
    sub.add_argument("--seed", type=int)
    sub.add_argument("--tokens", type=int, help="calibration tokens a layer (126080)")
    sub.add_argument("--clustering", help="hdbscan, dbscan, optics, kmeans, birch, random or none (one expert)")
    sub.add_argument("--clusters", type=int, help="number of clusters; k-means if --clustering does not say otherwise")
    sub.add_argument("--components", type=int, help="principal components before clustering (all features)")
    sub.add_argument("--cluster-tokens", type=int, help="of these, how many are clustered (all)")
    sub.add_argument("--min-cluster-size", type=float, help="share of the clustered tokens (0.006)")
    sub.add_argument("--min-samples", type=int)
    sub.add_argument("--criterion", help="output_variance, variance, magnitude or random")
    sub.add_argument("--keep", type=float, help="share of the variance that an expert keeps (0.95)")
    sub.add_argument("--statistics", help="cluster or routed")
    sub.add_argument("--compensation", help="none, mean or refit")
    sub.add_argument("--routing", help="cosine, euclidean, hash or random")
    sub.add_argument("--eps", type=float, help="radius, dbscan only")
    sub.add_argument("--method", help="moee, or moefication: disjoint experts, top-k a token")
    sub.add_argument("--experts", type=int, help="experts a layer, moefication only")
    sub.add_argument("--top-k", type=int, help="experts a token, moefication only")
    sub.add_argument("--split", help="weights (clusters of fc1's rows) or coactivation, moefication only")
    sub.add_argument("--selector", help="centre (parameter centre) or router (trained), moefication only")
    sub.add_argument("--refit-lambda", type=float, help="ridge, as a share of the Gram matrix's mean diagonal (0.01)")
    sub.add_argument("--refit-tokens", type=int, help="tokens a layer that the refit may use (126080)")
    sub.add_argument("--jobs", type=int, default=1, help="layers clustered side by side; each takes memory of its own")
    add_out(sub, "the extracted model")


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.pretrained import resolve
    from moee.config import make_extract_config
    from moee.pipeline import run_extract

    names = (
        "seed", "tokens", "clustering", "components", "cluster_tokens", "min_cluster_size", "min_samples", "clusters",
        "criterion", "keep", "statistics", "compensation", "routing", "eps", "refit_lambda", "refit_tokens",
        "method", "experts", "top_k", "split", "selector",
    )  # fmt: skip
    overrides = {name: getattr(args, name) for name in names}
    if args.clusters is not None and args.clustering is None:
        overrides["clustering"] = "kmeans"
    config = make_extract_config(args.preset, exclude=tuple(args.exclude) or None, **overrides)
    with ProgressDisplay() as report:
        spec = resolve(
            args.model, args.data, pretrained=args.pretrained, weights=args.weights, img_size=args.img_size, report=report
        )
        moee = run_extract(spec, args.data, config, args.out, args.force, report, jobs=args.jobs)
    console.print(layer_table(moee.info["layers"]))
    console.print(stage_table(moee.info, f"{spec.name} on {args.data}, preset {args.preset}"))
    if moee.info["skipped_images"]:
        console.print(f"skipped {len(moee.info['skipped_images'])} unreadable images")
    console.print(f"written to {args.out}; peak memory {moee.info['peak_memory_bytes'] / 2**30:.2f} GiB")
    return OK
