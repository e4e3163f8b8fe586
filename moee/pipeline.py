"""The commands `extract` and `finetune` as functions: load, run, evaluate against the dense model, save."""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from moee import checkpoint
from moee.atomic import refuse_existing, remove_folder
from moee.checkpoint import MoeeModel
from moee.clear_moe import ClearConfig, convert
from moee.config import ExtractConfig, FinetuneConfig
from moee.convert import extract
from moee.data import load_data, model_transform
from moee.errors import UserError
from moee.evaluate import Outputs, retention, run
from moee.finetune import finetune
from moee.layer_report import LayerReport
from moee.metrics import model_cost
from moee.models import ModelSpec, load_model
from moee.probe import Probe, fit_probe
from moee.progress import Reporter, silent


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_classifier(model: nn.Module) -> bool:
    return bool(getattr(model, "num_classes", 0))


class Session:
    """A dense model with its data: what extraction and fine-tuning share. Dense outputs are computed once."""

    def __init__(self, spec: ModelSpec, source: str, seed: int = 0, report: Reporter = silent):
        self.spec, self.source, self.report = spec, source, report
        self.dense = load_model(spec)
        self.transform = model_transform(self.dense)
        self.train = load_data(source, self.transform, "train", seed)
        self.held_out = load_data(source, self.transform, "val", seed)
        self._reference: Outputs | None = None
        self._train_outputs: Outputs | None = None

    @property
    def reference(self) -> Outputs:
        """The dense model's outputs on the held-out images."""
        if self._reference is None:
            self._reference = run(self.dense, self.held_out, self.report, "dense on held-out images")
        return self._reference

    @property
    def train_outputs(self) -> Outputs:
        """The dense model's outputs on the training images: what a probe is fitted on and a student learns from."""
        if self._train_outputs is None:
            self._train_outputs = run(self.dense, self.train, self.report, "dense on training images")
        return self._train_outputs

    def probe(self) -> Probe | None:
        """A probe on the dense features of the training images; None for classifiers and unlabelled data."""
        if is_classifier(self.dense) or not self.train.labelled:
            return None
        return fit_probe(self.train_outputs.features, self.train_outputs.labels)

    def measure(self, model: nn.Module, probe: Probe | None, message: str) -> dict:
        """Retention on held-out images, and cost weighted by the routing measured on them."""
        outputs = run(model, self.held_out, self.report, message)
        # a folder of 2 classes says nothing about a head of 1,000
        comparable = probe is not None or self.held_out.num_classes == getattr(self.dense, "num_classes", 0)
        kept = retention(self.reference, outputs, probe, is_classifier(self.dense), comparable)
        cost = model_cost(self.dense, model, outputs.shares, self.transform.size)
        return {"retention": kept.to_json(), "cost": cost, "shares": outputs.shares}


def run_extract(
    spec: ModelSpec, source: str, config: ExtractConfig | ClearConfig, out: Path | str, force: bool = False,
    report: Reporter = silent, session: Session | None = None, jobs: int = 1,
) -> MoeeModel:  # fmt: skip
    """`moee extract`: find experts in the model of `spec` on the training images of `source` and save the artifact.

    Raises `UserError` for bad input; nothing is written then.
    """
    refuse_existing(Path(out), force)
    session = session or Session(spec, source, config.seed, report)
    probe = session.probe()
    model = copy.deepcopy(session.dense)
    started = time.perf_counter()
    layers: Sequence[LayerReport]
    if isinstance(config, ClearConfig):
        layers = convert(model, session.train, config, report)
    else:
        layers = extract(model, session.train, config, report, jobs=jobs)
    seconds = time.perf_counter() - started
    info = {
        "stages": {"extracted": {**session.measure(model, probe, "extracted on held-out images"), "seconds": seconds}},
        "layers": [layer.to_json() for layer in layers],
        "skipped_images": list(session.train.skipped.values()),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    moee = MoeeModel(model.eval(), spec, config, source, probe, info)
    checkpoint.save(moee, out, force)
    return moee


def run_finetune(
    path: Path | str, config: FinetuneConfig, out: Path | str, source: str | None = None, force: bool = False,
    report: Reporter = silent, session: Session | None = None,
) -> MoeeModel:  # fmt: skip
    """`moee finetune`: distil the dense model into the artifact at `path` and save the result at `out`.

    An interrupted run leaves its state in `<out>.resume`; the same call goes on from there.
    """
    out = Path(out)
    refuse_existing(out, force)
    moee = checkpoint.load(path)
    if source is not None and session is None and source != moee.data and moee.probe is not None:
        raise UserError(f"the artifact's probe was fitted on {moee.data}, so it cannot be tuned on {source}; extract on {source}")
    seed = moee.config.seed if moee.config else 0
    session = session or Session(moee.spec, source or checkpoint.recorded_data(moee.data), seed, report)
    resume = out.parent / f"{out.name}.resume"
    started = time.perf_counter()
    result = finetune(moee.model, session.dense, session.train, config, report, resume, session.train_outputs.features)
    seconds = time.perf_counter() - started
    measured = session.measure(moee.model, moee.probe, "tuned on held-out images")
    tuned = {**measured, "seconds": seconds, "config": config.model_dump(), "best_epoch": result.best_epoch}
    losses = {"train": result.train_loss[1:], "validation": result.validation_loss}
    moee.info["stages"]["tuned"] = {**tuned, "losses": losses}
    moee.info["peak_memory_bytes"] = peak_memory_bytes()
    checkpoint.save(moee, out, force)
    remove_folder(resume)
    return moee
