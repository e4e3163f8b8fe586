"""The command line: `moee COMMAND`. Each command parses its flags, calls one function and shows the result.

Exit codes: 0 ok, 1 a gate failed, 2 usage or bad input, 3 the environment lacks something, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from exporter import commands
from exporter.commands import BAD_INPUT, ENVIRONMENT, INTERRUPTED
from moee import __version__
from moee.config import PRESETS
from moee.errors import MissingDependency, UserError


def _out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", required=True, help=f"folder for {what}; refused if it exists")
    parser.add_argument("--force", action="store_true", help="replace an existing output folder")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="moee", description="Extract experts from Vision Transformers and ship them.")
    parser.add_argument("--version", action="version", version=f"moee {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace, Console], int], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("extract", commands.extract, "find experts in a dense model's MLPs")
    sub.add_argument("model", help="timm model name, or dinov2-s")
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
    _out(sub, "the extracted model")

    sub = command("finetune", commands.finetune, "distil the dense model into an extracted one")
    sub.add_argument("path", help="folder that moee extract wrote")
    sub.add_argument("--data", help="default: the data it was extracted on")
    sub.add_argument("--epochs", type=int)
    sub.add_argument("--batch-size", type=int)
    sub.add_argument("--lr", type=float)
    sub.add_argument("--weight-decay", type=float)
    sub.add_argument("--temperature", type=float)
    sub.add_argument("--seed", type=int)
    sub.add_argument("--train-router", action="store_true", default=None)
    _out(sub, "the tuned model")

    sub = command("export", commands.export, "write dense, portable and TensorRT ONNX graphs")
    sub.add_argument("path", help="folder that moee extract or finetune wrote")
    _out(sub, "the graphs")

    sub = command("verify", commands.verify, "parity of torch and ONNX Runtime; exit code 1 if it fails")
    sub.add_argument("path", help="folder that moee export wrote")
    sub.add_argument("--model", help="artifact it was exported from (default: the one its manifest names)")
    sub.add_argument("--data", help="default: the data it was extracted on")
    sub.add_argument("--threads", type=int)
    sub.add_argument("--out", help="write parity.json here")

    sub = command("bench", commands.bench, "latency of the dense and the MoEE graph, interleaved")
    sub.add_argument("path", help="folder that moee export wrote")
    sub.add_argument("--batch", type=int, default=8)
    sub.add_argument("--runs", type=int, default=40)
    sub.add_argument("--threads", type=int)
    sub.add_argument("--out", help="write latency.json here")
    sub.add_argument("--fail-if-slower", action="store_true", help="exit code 1 if MoEE is slower than dense")

    sub = command("build", commands.build, "build dense and MoEE engines from an export")
    sub.add_argument("path", help="folder that moee export wrote")
    sub.add_argument("--backend", default="tensorrt-rtx", help="tensorrt-rtx (needs no GPU) or tensorrt")
    sub.add_argument("--plugin", help="plugin library (default: compiled and cached for --sm)")
    sub.add_argument("--sm", default="all", help="SMs of the plugin's kernels, such as 87 or 87,89 (all)")
    sub.add_argument("--min-shapes", "--minShapes", metavar="SHAPE", help="such as input:1x3x224x224, or a batch size (1)")
    sub.add_argument("--opt-shapes", "--optShapes", metavar="SHAPE", help="(8)")
    sub.add_argument("--max-shapes", "--maxShapes", metavar="SHAPE", help="(32)")
    sub.add_argument("--timing-cache", "--timingCacheFile", metavar="FILE", help="TensorRT's timing cache, read and written")
    _out(sub, "dense.plan, moee.plan and engine.json")

    plugin = subparsers.add_parser("plugin", help="the TensorRT plugin: build it, or bundle it for a device")
    actions = plugin.add_subparsers(dest="action", required=True, metavar="ACTION")
    sub = actions.add_parser("build", help="compile the kernels and the library (cached)")
    sub.add_argument("--sm", default="all", help="such as 87 or 87,89 (all)")
    sub.add_argument("--out", help="copy the library to this file")
    sub.set_defaults(run=commands.plugin_build)
    sub = actions.add_parser("bundle", help="a folder that compiles on the device with g++ and cmake alone")
    sub.add_argument("--sm", required=True, help="the device's SM: 87 for Jetson Orin, 110 for Thor")
    _out(sub, "the bundle")
    sub.set_defaults(run=commands.plugin_bundle)

    sub = command("inspect", commands.inspect, "MACs, parameters, experts and routing, layer by layer")
    sub.add_argument("model", help="timm model name, dinov2-s, or a folder that extract or finetune wrote")
    sub.add_argument("--img-size", type=int, help="input size in pixels, for models that take it")
    sub.add_argument("--json", action="store_true", help="print JSON")

    command("doctor", commands.doctor, "what is installed, what is missing, how to add it")

    sub = command("demo", commands.demo, "everything, on a real pretrained ViT-S and scikit-learn's digits")
    sub.add_argument("--epochs", type=int, default=3, help="epochs of fine-tuning")
    _out(sub, "all results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    # before torch is imported: OpenMP threads that spin at barriers slow a shared machine down about fivefold
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        return args.run(args, console)
    except UserError as error:
        if args.debug:
            raise
        errors.print(f"moee: {error}")
        return BAD_INPUT
    except MissingDependency as error:
        if args.debug:
            raise
        errors.print(f"moee: {error}")
        return ENVIRONMENT
    except KeyboardInterrupt:
        errors.print("moee: interrupted; earlier results are as they were")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
