"""`moee export`: write dense, portable and TensorRT ONNX graphs."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.terminal.flags import OK, add_moved, add_out, add_outputs, at_least, open_artifact
from exporter.terminal.ui import ProgressDisplay
from moee.bounds import CALIBRATION
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.store.result_kinds import EXPORT

TEXT = "write dense, portable and TensorRT ONNX graphs"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("export", help=TEXT, description=TEXT)
    sub.set_defaults(run=run, loads="exporter.graph.export")
    sub.add_argument("path", help="folder that moee extract or finetune wrote")
    sub.add_argument(
        "--precision", default="fp32",
        help="fp32, fp16, bf16, or int8 for the dense parts (int8: the rest in fp16; int8-fp32); norms, softmax and routing stay "
        "in float32 (fp32)",
    )  # fmt: skip
    sub.add_argument(
        "--runtime-ops", action="store_true",
        help="also runtime.onnx, for ONNX Runtime on a CPU: experts as an operator, whose library is compiled where it runs",
    )  # fmt: skip
    steps = "images that the steps of int8 are chosen by (128)"
    sub.add_argument("--calibration-images", type=at_least(*CALIBRATION), metavar="N", help=steps)
    sub.add_argument("--data", help="calibration images for int8 (default: what the model was tuned on, else extracted on)")
    add_moved(sub)
    add_out(sub, "the graphs")
    add_outputs(sub, _outputs)


def _outputs(args: argparse.Namespace) -> list[OutputFolder]:
    return [OutputFolder(args.out, EXPORT, args.force, source_paths(args.path, args.data, args.checkpoint))]


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.graph.export import export, read_quantization, space_of, weights_of
    from exporter.manifests import read_export
    from exporter.precision import dtype_of, refuse_calibration
    from exporter.quantization import CALIBRATION_IMAGES
    from moee.data.image_set import say_read
    from moee.space.refusal import say_space

    dtype_of(args.precision)
    refuse_calibration(args.precision, args.calibration_images is not None or bool(args.data))
    images = CALIBRATION_IMAGES if args.calibration_images is None else args.calibration_images
    with ProgressDisplay() as report:
        moee = open_artifact(args)
        say_space([space_of(moee, args.precision)], weights_of(moee), args.out)
        given = None
        if args.data:
            given = moee.record.images("train", args.data, report)
            say_read(train=given)
        export(
            moee, args.out, force=args.force, report=report, source=args.path, precision=args.precision, calibration=given,
            calibration_images=images, runtime_ops=args.runtime_ops,
        )  # fmt: skip
    names = ["dense.onnx", "portable.onnx", *(["runtime.onnx"] if args.runtime_ops else [])]
    console.print(f"{', '.join(names)} and tensorrt.onnx written to {args.out}")
    manifest = read_export(args.out, verify=False)
    for name in ("dense", "moee"):
        q = read_quantization(manifest, name)
        if q is not None:
            console.print(
                f"{name}: {len(q.input_scales)} dense layers in int8 (steps by {q.method}), output {q.sqnr_db:.1f} dB over the "
                f"noise on {q.images} images of {q.data}"
            )
            for layer, why in q.kept.items():
                console.print(f"{name}: {layer} kept in floating point: {why}", highlight=False)
    return OK
