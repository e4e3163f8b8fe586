"""One module a command: `add_parser` declares its flags, `run` calls one function, shows the result, returns the exit code."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moee.placement import Output, check_all, source_paths

if TYPE_CHECKING:  # importing torch takes seconds, and `--help` should not
    from rich.console import Console

    from moee.distributed import Group
    from moee.models import ModelSpec
    from moee.progress import Reporter

OK, GATE_FAILED, BAD_INPUT, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """`--out`, refused if it exists, and `--force`."""
    parser.add_argument("--out", required=True, help=f"folder for {what}; refused if it exists")
    parser.add_argument("--force", action="store_true", help="replace an earlier result of this command")


def add_outputs(parser: argparse.ArgumentParser, outputs: Callable[[argparse.Namespace], Sequence[Output]]) -> None:
    """Declare every place that a command writes to, with the inputs that it must not touch; they are checked before it runs."""
    parser.set_defaults(outputs=outputs)


def check_outputs(args: argparse.Namespace) -> None:
    """Raise `UserError` unless everything that the command line names can be written without a loss."""
    if "outputs" in args:
        check_all(args.outputs(args))


def model_inputs(args: argparse.Namespace) -> tuple[Path, ...]:
    """Paths among the flags of `add_model`; a plain name is timm's, whatever lies around under it."""
    return source_paths(args.data, args.weights, args.model if args.model and "/" in args.model else None)


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: a whole number that is not smaller."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, came {text!r}")
        return int(text)

    return number


def finite(text: str) -> float:
    """A type for argparse: a number, not NaN or infinite. A gate at such a value could not fail, or not pass."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, came {text!r}")
    return value


def add_ranks(parser: argparse.ArgumentParser, threads: bool = True) -> None:
    """Flags of the commands that torchrun can start on several processes."""
    if threads:
        parser.add_argument("--threads", type=at_least(1), help="of a rank (all cores; under torchrun OMP_NUM_THREADS or 1)")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes a rank that read and decode images ahead (0)")
    waits = "how long a rank waits for others (3600)"
    parser.add_argument("--rank-timeout", type=at_least(1), default=3600, metavar="S", help=waits)


@contextmanager
def rank_display(group: Group) -> Iterator[Reporter]:
    """Progress on rank 0; the others say nothing."""
    from exporter.ui import ProgressDisplay
    from moee.progress import silent

    if not group.leader:
        yield silent
        return
    with ProgressDisplay() as report:
        yield report


def add_model(parser: argparse.ArgumentParser) -> None:
    """A dense model, its weights, and the data to work on."""
    parser.add_argument("model", help="timm model name, or dinov2-s")
    parser.add_argument("--data", required=True, help="digits, photos, photos:N, an image folder, wds/FOLDER, or timm.data's")
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Where a dense model's weights come from, and its input size."""
    parser.add_argument("--pretrained", action="store_true", help="timm's pretrained weights")
    parser.add_argument("--weights", help="weights as a .safetensors file")
    seed = "draw the weights at random under this seed, which is recorded: for trials without a trained model"
    parser.add_argument("--random-weights", type=at_least(0), metavar="SEED", help=seed)
    add_img_size(parser)


def add_img_size(parser: argparse.ArgumentParser) -> None:
    """`--img-size`, as timm takes it."""
    what = "height and width of the images in pixels, or one number for both (the model's own)"
    parser.add_argument("--img-size", type=int, nargs="+", metavar=("H", "W"), help=what)


def add_attention(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Narrower heads, which every method can have beside it; with `several` a list of shares, to be parsed."""
    share = "narrow the heads of the attention to this share of its MACs; --target-macs counts what that saves"
    if several:
        share = "comma-separated shares of the attention's MACs to try, heads narrowed to them; 1 leaves them (1)"
        parser.add_argument("--attention-macs", metavar="SHARES", help=share)
    else:
        parser.add_argument("--attention-macs", type=float, metavar="SHARE", help=share)
    how = "separate: queries and keys may differ from values in width (default); equal: they may not"
    parser.add_argument("--attention-heads", help=how)


def show_skipped(console: Console, data_read: dict[str, Any]) -> None:
    """Name the images that could not be read, if there are any. `data_read`: `Session.data_facts` or a part of it."""
    from moee.data import skipped_line

    line = skipped_line(*[data_read[split] for split in ("train", "val") if split in data_read])
    if line:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def model_of(args: argparse.Namespace, report: Reporter) -> ModelSpec:
    """The model that the flags of `add_model` name."""
    from exporter.pretrained import resolve

    return resolve(
        args.model, args.data, pretrained=args.pretrained, weights=args.weights, random_weights=args.random_weights,
        img_size=args.img_size, report=report,
    )  # fmt: skip


def model_flags(args: argparse.Namespace) -> list[str]:
    """The flags of `add_weights` that were given, to be repeated for the next command."""
    words = ["--pretrained"] if args.pretrained else []
    for flag, value in (("--weights", args.weights), ("--random-weights", args.random_weights)):
        words += [] if value is None else [flag, str(value)]
    return words if args.img_size is None else [*words, "--img-size", *map(str, args.img_size)]
