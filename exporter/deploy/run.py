"""Classes or features of images by ONNX Runtime on the CPU. Needs Python 3, numpy, Pillow and onnxruntime; nothing of moee.

    python3 run.py IMAGE ...            # the class of each image, or the length of its feature vector
    python3 run.py --time 20 IMAGE      # also milliseconds an image, median of 20 runs

What cannot be read is named on standard error, and the exit code is 2 then. `models/preprocess.txt` says how images are prepared,
as timm's evaluation transform does it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

HERE = Path(__file__).resolve().parent
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--time", type=count, default=0, metavar="RUNS", help="time each image so many times")
    args = parser.parse_args(argv)
    check_files()
    session, graph, recipe, names, head = load()
    classifies = tells_classes()
    unreadable = 0
    for path in args.images:
        try:
            batch = prepared(path, recipe)[None]
        except Exception as error:  # damaged files raise many kinds
            print(f"{path} cannot be read as an image: {error}", file=sys.stderr)
            unreadable += 1
            continue
        output = run(session, batch, head)
        line = answer(output[0], names, classifies)
        if args.time > 0:
            line += f"  {median_ms(session, batch, args.time):.2f} ms by {graph}"
        print(f"{path}: {line}")
    return 2 if unreadable else 0


def count(text: str) -> int:
    """A type for argparse: a whole number from 0."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, came {text!r}")
    return int(text)


def check_files() -> None:
    """Exit unless every file is the one that SHA256SUMS lists."""
    try:
        listed = [line.split("  ", 1) for line in (HERE / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]
        sums = {name: digest for digest, name in listed}
    except (OSError, ValueError):
        sys.exit("SHA256SUMS is missing or was changed; copy the bundle again")
    for name, digest in sums.items():
        if not (HERE / name).is_file() or hashlib.sha256((HERE / name).read_bytes()).hexdigest() != digest:
            sys.exit(f"{name} is missing or was changed; copy the bundle again")


def tells_classes() -> bool:
    """Whether the graph, or the classifier beside it, tells classes apart; their names may not be known."""
    try:
        classes = json.loads((HERE / "deployment.json").read_text(encoding="utf-8"))["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        sys.exit("deployment.json is missing or was changed; copy the bundle again")
    return classes is not None


def load() -> tuple[onnxruntime.InferenceSession, str, dict[str, list[str]], list[str], tuple[np.ndarray, np.ndarray] | None]:
    """The graph, how images are prepared, the classes' names, and the classifier of a graph that ends in features."""
    models = HERE / "models"
    session, graph = session_of(models)
    lines = (models / "preprocess.txt").read_text(encoding="utf-8").splitlines()
    recipe = {key: values for key, *values in (line.split() for line in lines if line and not line.startswith("#"))}
    labels = models / "labels.txt"
    names = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else []
    head = None
    if (models / "head.bin").is_file():
        content = (models / "head.bin").read_bytes()
        classes, features = struct.unpack("<ii", content[:8])
        values = np.frombuffer(content, "<f4", offset=8)
        head = values[: classes * features].reshape(classes, features), values[classes * features :]
    return session, graph, recipe, names, head


def session_of(models: Path) -> tuple[onnxruntime.InferenceSession, str]:
    """The faster graph, if the bundle has one and its operator can be loaded, else the graph of standard operators; its name."""
    providers = ["CPUExecutionProvider"]
    if (models / "runtime.onnx").is_file():
        places = [HERE / "operator" / "libmoee_onnxruntime.so", HERE / "operator" / platform.machine() / "libmoee_onnxruntime.so"]
        library = next((place for place in places if place.is_file()), None)
        reason = f"the operator's library for {platform.machine()} is missing"
        if library is not None:
            options = onnxruntime.SessionOptions()
            try:
                options.register_custom_ops_library(str(library))
                return onnxruntime.InferenceSession(str(models / "runtime.onnx"), options, providers=providers), "runtime.onnx"
            except Exception as error:  # ONNX Runtime's exceptions share no public base class
                reason = str(error).splitlines()[0]
        print(f"the graph of standard operators is used: {reason}; operator/build.sh compiles it here", file=sys.stderr)
    return onnxruntime.InferenceSession(str(models / "portable.onnx"), providers=providers), "portable.onnx"


def prepared(path: str, recipe: dict[str, list[str]]) -> np.ndarray:
    """An image as the graph takes it: [3, H, W] float32. Of the same pixels as timm's evaluation transform."""
    image = opened(path)
    image = image.resize(resized(image, recipe), FILTERS[recipe["filter"][0]])
    height, width = map(int, recipe["size"])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    mean, std = (np.array(recipe[key], np.float32) for key in ("mean", "std"))
    return ((pixels - mean) / std).transpose(2, 0, 1)


def opened(path: str) -> Image.Image:
    """An image in RGB. 16-bit grey levels are scaled to 8 bits, which Pillow itself would clip. Raises `ValueError` for other
    depths."""
    with Image.open(path) as picture:
        if picture.mode[0] in "IF":
            levels = np.asarray(picture)
            if picture.mode == "F" or levels.min() < 0 or levels.max() > 65535:
                raise ValueError(f"its levels go from {levels.min():g} to {levels.max():g}; expected 8 or 16 bits a channel")
            return Image.fromarray((levels / 257).round().astype(np.uint8)).convert("RGB")
        return picture.convert("RGB")


def resized(image: Image.Image, recipe: dict[str, list[str]]) -> tuple[int, int]:
    """Width and height before the crop: a square is covered by torchvision's rule, which rounds the longer side down, a
    rectangle by timm's, which rounds to the nearest."""
    height, width = map(int, recipe["resize"])
    if recipe["crop"][0] == "squash":
        return width, height
    if height != width:
        ratio = min(image.height / height, image.width / width)
        return round(image.width / ratio), round(image.height / ratio)
    if image.width > image.height:
        return int(width * image.width / image.height), height
    return width, int(height * image.height / image.width)


def run(session: onnxruntime.InferenceSession, batch: np.ndarray, head: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Class scores [N, classes] of a batch, or features [N, ...] where there is no classifier."""
    given = session.get_inputs()[0]
    output: np.ndarray = session.run(None, {given.name: batch.astype(np.float16 if "float16" in given.type else np.float32)})[0]
    return output if head is None else output.astype(np.float32) @ head[0].T + head[1]


def answer(output: np.ndarray, names: list[str], classifies: bool) -> str:
    """The best class of logits [C] with its share, or the size of features, in words."""
    if not classifies or output.ndim != 1:
        return f"features {list(output.shape)}, length {np.linalg.norm(output):.4f}"
    best = int(output.argmax())
    share = np.exp(output - output.max())
    return f"{names[best] if names else f'class {best}'} ({share[best] / share.sum():.1%})"


def median_ms(session: onnxruntime.InferenceSession, batch: np.ndarray, runs: int) -> float:
    """Median milliseconds of `runs` runs on images [B, C, H, W]."""
    times = []
    for _ in range(runs + 2):
        started = time.perf_counter()
        run(session, batch, None)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[2:])


def quiet(work: Callable[[], int]) -> int:
    """The exit code of `work`; a reader of the output that is gone, or Ctrl-C, ends it without a traceback."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # Python would complain again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(quiet(main))
