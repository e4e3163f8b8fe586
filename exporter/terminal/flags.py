"""Exit codes, and the flags that several commands have."""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moee.bounds import CLASSES, DAY, JOBS, WORKERS
from moee.config import MAX_SIDE, MOST_COUNT
from moee.places.inputs import source_paths
from moee.places.placement import Output, check_all
from moee.schema import shown

if TYPE_CHECKING:  # importing torch takes seconds, and `--help` should not
    from rich.console import Console

    from exporter.pretrained import ModelOptions
    from moee.artifacts.model import MoeeModel
    from moee.models.model import ModelSpec
    from moee.parallel.group import Group
    from moee.progress import Reporter
    from moee.stages.session import Session, Trial

NAMES = "timm model name, local-dir:FOLDER, hf-hub:ID, torchvision:NAME, hf:FOLDER, package.module:function"
MOVED = "where the dense model's file of weights lies now, if it was moved since extraction"
OK, GATE_FAILED, BAD_INPUT, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130
WEEK = 7 * DAY


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
    folder = (args.model or "").removeprefix("local-dir:").removeprefix("hf:")
    return source_paths(args.data, args.checkpoint, args.class_map, folder if folder != args.model or "/" in folder else None)


def at_least(least: int, most: int = MOST_COUNT) -> Callable[[str], int]:
    """A type for argparse: a whole number that is not smaller than `least`, nor larger than anything could hold."""

    def number(text: str) -> int:
        plain = text.isascii() and text.isdecimal() and len(text) < 40  # Python refuses to read thousands of digits
        if not plain or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, came {shown(text, limit=40)}")
        return int(text)

    return number


def finite(least: float, most: float) -> Callable[[str], float]:
    """A type for argparse: a number from `least` to `most`, never NaN. A gate at such a value could not fail, or not pass."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a number from {least:g} to {most:g}, came {shown(text, limit=40)}")
        return value

    return number


def several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A type for argparse: values of a `kind`, separated by commas."""

    def values(text: str) -> tuple[Any, ...]:
        return tuple(kind(part.strip()) for part in text.split(","))

    return values


def add_ranks(parser: argparse.ArgumentParser, threads: bool = True) -> None:
    """Flags of the commands that torchrun can start on several processes."""
    if threads:
        what = "of a rank (all cores; under torchrun OMP_NUM_THREADS or 1)"
        parser.add_argument("--threads", type=at_least(*JOBS), help=what)
    ahead = "processes a rank that read and decode images ahead (0)"
    parser.add_argument("--workers", type=at_least(*WORKERS), default=0, help=ahead)
    waits = "seconds without a rank that computes, after which the run is given up (3600)"
    parser.add_argument("--rank-timeout", type=at_least(1, WEEK), default=3600, metavar="S", help=waits)


def add_device(parser: argparse.ArgumentParser, *, target: bool = False, what: str = "where torch computes") -> None:
    """`--device`, also called `--torch-device`; that alone where the command has a `target` device of that name."""
    names = ["--torch-device"] if target else ["--device", "--torch-device"]
    text = f"{what}: cpu, cuda, cuda:1 or auto, a GPU if there is one (auto)"
    parser.add_argument(*names, dest="torch_device", default="auto", metavar="NAME", help=text)


@contextmanager
def rank_display(group: Group) -> Iterator[Reporter]:
    """Progress on rank 0; the others say nothing."""
    from exporter.terminal.ui import ProgressDisplay
    from moee.progress import silent

    if not group.leader:
        yield silent
        return
    with ProgressDisplay() as report:
        yield report


def add_model(parser: argparse.ArgumentParser) -> None:
    """A dense model, its weights, and the data to work on."""
    parser.add_argument("model", help=f"{NAMES}, or dinov2-s")
    text = "digits, photos, photos:N, photo-crops, an image folder, wds/FOLDER, or timm.data's"
    parser.add_argument("--data", required=True, help=text)
    add_weights(parser)
    add_class_map(parser)


def add_trial(parser: argparse.ArgumentParser) -> None:
    """`--no-trial-export`, of the commands that work for long on a model which is to be exported."""
    text = "begin without exporting one layer of experts to ONNX first, for models that ONNX cannot express"
    parser.add_argument("--no-trial-export", action="store_true", help=text)


def trial_of(args: argparse.Namespace) -> Trial | None:
    """What the flag of `add_trial` leaves to be tried."""
    from exporter.graph.trial_export import try_export

    return None if args.no_trial_export else try_export


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Where a dense model's weights come from, and its arguments, by timm's own flags."""
    parser.add_argument("--pretrained", action="store_true", help="the pretrained weights of timm or torchvision")
    add_checkpoint(parser, "weights of your own: .safetensors, or .pth, .pt, .bin, .ckpt, .pth.tar by torch.save")
    seed = "draw the weights at random under this seed, which is recorded: for trials without a trained model"
    parser.add_argument("--random-weights", type=at_least(0, 2**63 - 1), metavar="SEED", help=seed)
    classes = "classes of the model, 0 for features alone (the checkpoint's)"
    parser.add_argument("--num-classes", type=at_least(*CLASSES), metavar="N", help=classes)
    parser.add_argument("--in-chans", type=at_least(1, MAX_SIDE), metavar="N", help="input channels, for models that take it (3)")
    what = "height and width of the images in pixels, or one number for both (the model's own)"
    parser.add_argument("--img-size", type=at_least(1, MAX_SIDE), nargs="+", metavar=("H", "W"), help=what)
    others = "further arguments of the model or function, such as global_pool=avg; values as Python writes them"
    parser.add_argument("--model-kwargs", nargs="*", action=KeyValues, default={}, metavar="K=V", help=others)


def add_checkpoint(parser: argparse.ArgumentParser, text: str) -> None:
    """`--checkpoint`, also by its older name."""
    parser.add_argument("--checkpoint", "--weights", metavar="FILE", help=text)


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """`--min-shapes`, `--opt-shapes` and `--max-shapes`, also by trtexec's names; `batch_profile` reads them."""
    for name, what in (("min", "smallest batch, such as input:1x3x224x224 or 1 (1)"), ("opt", "usual batch (8)"),
                       ("max", "largest batch (32)")):  # fmt: skip
        parser.add_argument(f"--{name}-shapes", f"--{name}Shapes", metavar="SHAPE", help=what)


def add_word(parser: argparse.ArgumentParser) -> None:
    """`--model`, of the commands that read an artifact: what only a manifest names is never imported."""
    what = "function of your own that the artifact was made from, and which may be imported: package.module:function"
    parser.add_argument("--model", dest="word", metavar="FUNCTION", help=what)


def add_moved(parser: argparse.ArgumentParser) -> None:
    """Where an artifact's dense model comes from now: `open_artifact` reads the flags."""
    add_checkpoint(parser, MOVED)
    add_word(parser)


def open_artifact(args: argparse.Namespace) -> MoeeModel:
    """The artifact at `args.path`, its dense model from where the flags of `add_moved` say."""
    from moee.artifacts import checkpoint

    moee = checkpoint.load(args.path, args.word)
    if args.checkpoint is not None:
        moee.take_weights(args.checkpoint)
    return moee


def add_class_map(parser: argparse.ArgumentParser) -> None:
    """`--class-map`, of the commands that read labels."""
    order = "order of the classes: a text file, one name a line, or name and number (the folders' natural order)"
    parser.add_argument("--class-map", metavar="FILE", help=order)


class KeyValues(argparse.Action):
    """`k=v ...` to a dictionary, as timm's scripts take it: values as Python literals, anything else as text."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        given = dict(getattr(namespace, self.dest) or {})  # the flag may come again
        for word in values:
            key, equals, text = word.partition("=")
            if not equals or not key.isidentifier():
                parser.error(f"argument {option}: expected name=value, came {word!r}")
            if key in given:
                parser.error(f"argument {option}: {key} is given twice")
            try:
                given[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                given[key] = text
        setattr(namespace, self.dest, given)


def show_skipped(console: Console, data_read: dict[str, Any]) -> None:
    """Name the images that could not be read, if there are any. `data_read`: `Session.data_facts` or a part of it."""
    from moee.data.image_set import skipped_line

    line = skipped_line(*[data_read[split] for split in ("train", "val") if split in data_read])
    if line:
        console.print(line, highlight=False, soft_wrap=True)


def model_of(args: argparse.Namespace, report: Reporter, console: Console) -> ModelSpec:
    """The model that the flags of `add_weights` describe; what was taken and guessed is printed. Raises `UserError`."""
    from exporter import pretrained
    from moee.errors import UserError
    from moee.store.wrong_folder import what_is_in

    held = what_is_in(args.model)
    if held:
        raise UserError(f"{held}, and a dense model is needed: give its name, one of {NAMES}")
    return pretrained.resolve(args.model, args.data, options_of(args), report, speak(console))


def session_of(args: argparse.Namespace, report: Reporter, console: Console, device_option: str = "--device") -> Session:
    """The model and the data that the flags of `add_model` describe, loaded, under `--seed` where a command has it; on the
    device of `add_device`, whose flag may have another name."""
    from moee.parallel.joining import alone
    from moee.stages import session as stage

    group = alone(args.torch_device, device_option)
    spec = model_of(args, report, console)
    trial = trial_of(args) if "no_trial_export" in args else None
    seed, classes = getattr(args, "seed", None) or 0, classes_of(args)
    session = stage.Session(
        spec, args.data, seed=seed, report=report, group=group, classes=classes, trial=trial, memory=getattr(args, "memory", None)
    )
    session.check_names(classes)
    return session


def options_of(args: argparse.Namespace) -> ModelOptions:
    """The flags of `add_weights`."""
    from exporter.pretrained import ModelOptions

    return ModelOptions(
        args.pretrained, args.checkpoint, args.random_weights, args.num_classes, args.in_chans, args.img_size, args.model_kwargs
    )


def speak(console: Console, quiet: bool = False) -> Callable[[str], None]:
    """Sentences that may hold what came from a file, printed as they are; none if standard output is for a program."""
    return partial(console.print, highlight=False, soft_wrap=True) if not quiet else lambda text: None


def classes_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The classes that `--class-map` names; none without it."""
    from moee.data.class_map import read_class_map

    return read_class_map(args.class_map) if args.class_map is not None else ()


def model_flags(args: argparse.Namespace) -> list[str]:
    """The flags of `add_weights` and `add_class_map` that were given, to be repeated for the next command."""
    words = ["--pretrained"] if args.pretrained else []
    for name in ("checkpoint", "random_weights", "num_classes", "in_chans", "img_size", "class_map"):
        value = getattr(args, name, None)  # inspect takes no class map
        values = value if isinstance(value, list) else [value]
        words += [] if value is None else [f"--{name.replace('_', '-')}", *map(str, values)]
    pairs = [f"{name}={value}" for name, value in args.model_kwargs.items()]
    return words + (["--model-kwargs", *pairs] if pairs else [])
