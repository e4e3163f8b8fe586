"""One model of the zoo through the commands that a user would type: extract, export, verify.

`write_outcome` runs it in a process of its own, forked from one that has loaded the libraries.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import shutil
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from exporter.cli import main
from exporter.graph.export import DENSE, PORTABLE
from exporter.precision import typed
from exporter.pretrained import ModelOptions, layout_of
from exporter.runners import OnnxRunner
from moee.artifacts import checkpoint
from moee.data.transform import model_transform
from moee.interface.adapted import AdaptedModel
from moee.layers.report import FROM_THE_START
from moee.methods.identity import whole_ffn
from moee.mlps.find import described, find_ffns
from moee.mlps.proof import random_images
from moee.mlps.sites import put_mlp
from moee.models.model import ModelSpec, Shape, build_model
from moee.store.tensor_file import write_tensors
from tests.zoo.table import ENTRIES, Entry

HF = "hf:"  # begins the names of transformers' classes in the table, and those of its folders
WORKS, REFUSED, WRONG, UNEXPECTED = "works", "refused", "wrong", "unexpected"
CLASSES, TRAIN, HELD_OUT, SIDE = 4, 6, 3, 80  # classes, images a class, pixels
REFUSAL_S = 30.0  # of a core, within which a model is refused: before any long work
OFF = 1e-3  # of the output's root mean square: float32 in another order stays a hundred times below on the zoo's models
OVERFLOWS = "`verify` fails: activations are beyond float16, in PyTorch too"
FLAT = 1e-3  # deviation of a tensor's numbers below which it is as good as constant
METHOD = tuple("--clustering kmeans --clusters 3 --components 8 --cluster-tokens 400 --tokens 2000 --keep 0.9".split())


@dataclass(frozen=True)
class Outcome:
    """What became of a model: `cut` of `candidates` MLPs, the reason for the others or the refusal, and what fp16 gave."""

    kind: str
    cut: int = 0
    candidates: int = 0
    reason: str = ""
    half: str = ""
    seconds: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Outcome:
        return cls(**json.loads(path.read_text()))

    @property
    def good(self) -> bool:
        return self.kind in (WORKS, REFUSED)


@dataclass(frozen=True)
class Command:
    """How a command ended: exit code, what it printed to standard error, seconds of a core."""

    code: int
    errors: str
    seconds: float

    @property
    def sentence(self) -> str:
        return next((line for line in self.errors.splitlines() if line.startswith("moee: ")), "").removeprefix("moee: ")

    @property
    def clean(self) -> bool:
        """Whether it ended as the commands promise: no traceback, no control characters, nothing that nobody expected."""
        return not any(sign in self.errors for sign in ("Traceback", "unexpected ", "\x1b", "?["))


class Broken(Exception):
    """An outcome that ends the run of a model."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def write_images(folder: Path) -> Path:
    """Training and held-out images [SIDE, SIDE] of `CLASSES` classes: a pattern each, with noise."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 256, (CLASSES, 5, 5, 3), np.uint8)
    for split, count in (("train", TRAIN), ("val", HELD_OUT)):
        for label, pattern in enumerate(patterns):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            coarse = np.asarray(Image.fromarray(pattern).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
            for number in range(count):
                noisy = coarse + random.integers(-60, 61, coarse.shape)
                Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(place / f"{number}.png")
    return folder


def words(entry: Entry, folder: Path) -> list[str]:
    """What a user types for the model: its name, its weights (written to `folder`), and the flags that make it small."""
    if entry.name.startswith(HF):
        return [f"{HF}{write_folder(entry, folder / 'transformers')}"]
    said = [entry.name, "--checkpoint", str(write_weights(entry, folder / "weights.safetensors")), "--num-classes", str(CLASSES)]
    said += [] if entry.pixels is None else ["--img-size", str(entry.pixels)]
    return said + (["--model-kwargs", *(f"{name}={value}" for name, value in entry.kwargs.items())] if entry.kwargs else [])


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """A model of random weights in which nothing is hidden: LayerScales of 1e-6, constant norms and heads near zero are drawn."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1 and float(parameter.std()) < FLAT:
            tiny = 0 < float(parameter.abs().max()) < 0.1
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if tiny else 0.1)
    return model


def write_weights(entry: Entry, path: Path) -> Path:
    """A file of weights for timm's or torchvision's model, by the library's own names."""
    size = None if entry.pixels is None else [entry.pixels]
    torch.manual_seed(0)
    model = build_model(layout_of(entry.name, ModelOptions(num_classes=CLASSES, img_size=size, model_kwargs=entry.kwargs)))
    model = stirred(model.net if isinstance(model, AdaptedModel) else model)
    write_tensors(model.state_dict(), path)
    return path


def write_folder(entry: Entry, folder: Path) -> Path:
    """A folder as transformers saves a model: its class, with the configuration of the entry."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, entry.name.removeprefix(HF))
    if "text_config" in kind.config_class.sub_configs:
        text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=50)
        config = kind.config_class(vision_config=entry.kwargs, text_config=text)
    else:
        config = kind.config_class(**entry.kwargs, num_labels=CLASSES)
    stirred(kind(config)).save_pretrained(folder)
    return folder


def command(*argv: str | Path) -> Command:
    """Run a command line in this process."""
    errors, started = io.StringIO(), time.process_time()
    handler = logging.StreamHandler(errors)
    with redirect_stdout(io.StringIO()), redirect_stderr(errors):
        logging.getLogger().addHandler(handler)
        try:
            code = main([str(word) for word in argv])
        finally:
            logging.getLogger().removeHandler(handler)
    return Command(code, errors.getvalue(), time.process_time() - started)


def run(entry: Entry, data: Path, folder: Path) -> Outcome:
    """All commands on one model, and its graphs held against the torch models; results go to `folder`."""
    started = time.perf_counter()
    try:
        outcome = _run(entry, data, folder)
    except Broken as broken:
        outcome = Outcome(broken.kind, reason=str(broken))
    except Exception as error:  # of the zoo's own code: nobody's refusal
        outcome = Outcome(UNEXPECTED, reason=f"{type(error).__name__}: {error}")
    return Outcome(**{**asdict(outcome), "seconds": round(time.perf_counter() - started, 1)})


def _run(entry: Entry, data: Path, folder: Path) -> Outcome:
    given = words(entry, folder)
    name, *_ = given
    extracted = command("extract", *given, "--data", data, *(entry.options or METHOD), "--out", folder / "model")
    if extracted.code == 2 and extracted.clean and extracted.sentence:
        if extracted.seconds > REFUSAL_S:
            raise Broken(UNEXPECTED, f"refused after {extracted.seconds:.0f} s: {extracted.sentence}")
        if (folder / "model").exists():
            raise Broken(UNEXPECTED, f"refused with a result left behind: {extracted.sentence}")
        return Outcome(REFUSED, reason=extracted.sentence.replace(name, entry.name))
    _expect("extract", extracted)
    _expect("export", command("export", folder / "model", "--out", folder / "fp32"))
    _expect("verify", command("verify", folder / "fp32", "--max-shapes", "3", "--opt-shapes", "2"))
    moee = checkpoint.load(folder / "model")
    _compare(moee, folder / "fp32")
    layers = moee.info["layers"]
    rest = {layer["name"]: layer["status"].removeprefix(FROM_THE_START) for layer in layers if layer["status"] != "routed"}
    return Outcome(WORKS, len(layers) - len(rest), len(layers), described(rest), _half(folder, moee))


def _expect(name: str, done: Command) -> None:
    """Raise `Broken` unless a command succeeded: a gate that failed is wrong, anything else was not to be expected after the
    model had been accepted."""
    if done.code == 0:
        return
    gate = name.startswith("verify") and done.code == 1 and done.clean
    raise Broken(WRONG if gate else UNEXPECTED, f"{name} ended with {done.code}: {done.sentence or done.errors[-300:]}")


def _half(folder: Path, moee: checkpoint.MoeeModel) -> str:
    """What float16 gives: "works", the sentence of its refusal, or that PyTorch overflows there too, which `verify` reports."""
    exported = command("export", folder / "model", "--precision", "fp16", "--out", folder / "fp16")
    if exported.code == 2 and exported.clean:
        return f"refused: {exported.sentence}"
    _expect("export --precision fp16", exported)
    verified = command("verify", folder / "fp16", "--max-shapes", "3", "--opt-shapes", "2")
    if verified.code == 1 and verified.clean and overflows(moee.dense().eval(), _shape(moee.spec)):
        return OVERFLOWS
    _expect("verify of fp16", verified)
    return WORKS


@torch.no_grad()
def overflows(model: nn.Module, shape: Shape) -> bool:
    """Whether PyTorch's float16 run of a model, finite in float32, gives anything but numbers on random images of `shape`."""
    images = random_images(shape, torch.zeros(()))
    return bool(model(images).isfinite().all()) and not bool(typed(model, torch.float16)(images).isfinite().all())


@torch.no_grad()
def _compare(moee: checkpoint.MoeeModel, export: Path) -> None:
    """Raise `Broken` unless the dense model with every neuron kept gives the dense output, and both graphs what torch gives."""
    dense = moee.dense().eval()
    shape = _shape(moee.spec)
    images = random_images(shape, torch.zeros(()))
    expected = dense(images)
    kept = copy.deepcopy(dense)
    for ffn in find_ffns(dense, gated=True).ffns:
        put_mlp(kept, ffn.name, whole_ffn(ffn), ffn.bypassed)
    cases = [("the model with every neuron kept", expected, kept(images))]
    for name, network in ((DENSE, dense), (PORTABLE, moee.model.eval())):
        with OnnxRunner(export / name, threads=1) as runner:
            for count in (1, len(images)):
                given = torch.from_numpy(runner.run(images[:count].numpy())[0])
                cases.append((f"{name} at batch {count}", network(images[:count]), given))
    for what, wanted, given in cases:
        off = distance(wanted, given)
        if not off <= OFF:
            raise Broken(WRONG, f"{what} is off by {off:.2g} of the output's size")


def distance(wanted: Tensor, given: Tensor) -> float:
    """Largest difference in units of the root mean square of what was `wanted`; infinite for another shape or NaN."""
    if wanted.shape != given.shape:
        return float("inf")
    off = float((wanted - given).abs().max() / wanted.square().mean().sqrt())
    return off if off == off else float("inf")


def _shape(spec: ModelSpec) -> Shape:
    with torch.device("meta"):
        model: nn.Module = build_model(spec)
    return model_transform(model).shape


def write_outcome(number: int, data: Path, target: Path) -> None:
    """Run an entry of the table; the outcome is written to `target` as JSON, what the process prints beside it, as `.log`."""
    log = os.open(target.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    scratch = Path(tempfile.mkdtemp(prefix="moee-zoo-"))
    try:
        target.write_text(json.dumps(asdict(run(ENTRIES[number], data, scratch))))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
