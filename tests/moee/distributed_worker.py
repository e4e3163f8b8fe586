"""One rank of the distributed tests: runs every case and, on rank 0, writes what came out.

Started with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, as torchrun would: `python -m
tests.moee.distributed_worker FOLDER`. `FOLDER` gets `results.json` and the weights of each case.
"""

import copy
import json
import logging
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file

from moee.calibrate import refit
from moee.calibrate.calibration import collect_tokens, gather_tokens
from moee.calibrate.in_step import InStep
from moee.config import FinetuneConfig
from moee.data.image_set import TensorSet
from moee.errors import UserError
from moee.measure.evaluation import run
from moee.methods.heads import narrowing
from moee.methods.recipe import make_recipe, method_options
from moee.mlps.find import find_ffns
from moee.models.model import load_model
from moee.parallel.group import Group, Parcel
from moee.parallel.joining import joined
from moee.stages.extract import run_extract
from moee.stages.finetune import run_finetune
from moee.train.finetuning import finetune
from tests.conftest import extract, tiny_images, tiny_spec

KMEANS = dict(clustering="kmeans", clusters=4, cluster_tokens=500)
TUNE = dict(epochs=2, lr=1e-3, batch_size=7)  # 43 training images: the last batch holds one, fewer than there are ranks
EXTRACTIONS = {
    "kmeans": method_options(**KMEANS),
    "hdbscan": method_options(min_cluster_size=0.02, keep=0.8, cluster_tokens=400, components=8),
    "sensitivity": method_options(criterion="sensitivity", allocation="model", target_macs=0.8, **KMEANS),
    "moefication": method_options("moefication", experts=4, top_k=2),
    "corp": method_options("corp", keep=0.6),
    "lowrank": method_options("lowrank", target_macs=0.8, calibration_images=40),
    "clear": method_options(method="clear-moe", experts=2, rank=12, residual_rank=2, calibration_images=40),
}
FEW = {
    "experts": method_options(clustering="kmeans", clusters=2, target_macs=0.9),
    "sensitivity": method_options(clustering="kmeans", clusters=2, criterion="sensitivity", allocation="model", target_macs=0.9),
}
TUNINGS = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "checkpointing": {"checkpointing": True},
    "tokens": {"distil": "tokens", "accumulate": 2},
    "bf16": {"amp": "bf16", "force_amp": True},
    "fp16": {"amp": "fp16", "force_amp": True},
}


class Broken(TensorSet):
    """Images of which some cannot be read."""

    def __init__(self, images: TensorSet, bad: set[int]):
        super().__init__("broken", images.images, images.labels, images.num_classes)
        self.bad = bad

    def load(self, index):
        if index in self.bad:
            raise OSError("truncated")
        return super().load(index)


def experts(group: Group, folder: Path, dense: torch.nn.Module) -> dict:
    """Every extraction; returns shares measured over the ranks."""
    data, found = tiny_images(70), {}
    for name, config in EXTRACTIONS.items():
        model = copy.deepcopy(dense)
        reports = extract(model, data, config, group=group)
        keep(group, model, folder / f"{name}.safetensors")
        found[name] = {"reports": [r.to_json() for r in reports], "shares": run(model, data, batch_size=9, group=group).shares}
    return found


def few(group: Group, folder: Path) -> None:
    """One layer and one image: of several ranks most have neither."""
    data = tiny_images(1)
    for name, config in FEW.items():
        torch.manual_seed(1)
        model = load_model(tiny_spec(depth=1))
        extract(model, data, config, group=group)
        keep(group, model, folder / f"few-{name}.safetensors")


def keep(group: Group, model: torch.nn.Module, path: Path) -> None:
    """Save rank 0's weights, once every rank has shown that it holds the same."""
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    mine = torch.cat([v.reshape(-1).double() for v in state.values()])
    theirs = group.broadcast(Parcel(None, {"state": mine}) if group.leader else None).tensors["state"]
    assert torch.equal(mine, theirs), f"rank {group.rank} ends with other weights than rank 0"
    if group.leader:
        save_file(state, path)


def sample(group: Group, folder: Path, dense: torch.nn.Module) -> dict:
    """The token sample of a set with unreadable images, one whole batch of them, put together on each layer's rank."""
    data, ffns = Broken(tiny_images(100), {3, *range(32, 64)}), find_ffns(dense).ffns
    tokens = {}
    for budget in (300, 1):  # the one token falls on one rank
        own = collect_tokens(dense, ffns, data, folder / f"tokens-{group.rank}", budget, group=group)
        whole = own if group.alone else gather_tokens(own, group)
        tokens |= {f"{t.name}.{budget}": t.load() for t in whole if t is not None}
    parts = group.gather(Parcel(None, tokens))
    if group.leader:
        save_file({name: t.contiguous() for part in parts for name, t in part.tensors.items()}, folder / "sample.safetensors")
    return {"skipped": sorted(data.skipped)}


def tunings(group: Group, folder: Path, dense: torch.nn.Module) -> dict:
    data, found = tiny_images(48), {}
    cut = copy.deepcopy(dense)
    extract(cut, data, method_options("paper", keep=0.5, clustering="kmeans", clusters=4))
    for name, options in TUNINGS.items():
        model = copy.deepcopy(cut)
        resume = folder / f"resume-{name}"
        result = finetune(model, copy.deepcopy(dense), data, FinetuneConfig(**TUNE, **options), resume=resume, group=group)
        keep(group, model, folder / f"tuned-{name}.safetensors")
        found[name] = {"train": result.train_loss[1:], "validation": result.validation_loss, "best": result.best_epoch}
    # a run that was stopped after the first epoch, and went on
    model, resume = copy.deepcopy(cut), folder / "resume-again"

    def stop(message: str, done: int, total: int) -> None:
        if message == "finetune" and done > total // 2:
            raise InterruptedError

    try:
        finetune(model, dense, data, FinetuneConfig(**TUNE), stop, resume=resume, group=group)
    except InterruptedError:
        pass
    group.barrier()
    model = copy.deepcopy(cut)
    finetune(model, dense, data, FinetuneConfig(**TUNE), resume=resume, group=group)
    keep(group, model, folder / "tuned-again.safetensors")
    return found


def refusals(group: Group, dense: torch.nn.Module) -> dict:
    """Errors that one rank alone meets are every rank's."""
    diverging = FinetuneConfig(epochs=3, batch_size=4).model_copy(update={"lr": 1e30})  # beyond what a user may give
    found = {}
    images = tiny_images(70)
    images.images[66] = math.nan  # on the last rank
    for name, work in {
        "nan": lambda: extract(copy.deepcopy(dense), images, EXTRACTIONS["kmeans"], group=group),
        "unreadable": lambda: run(dense, Broken(tiny_images(40), set(range(40))), group=group),
        "rate": lambda: finetune(copy.deepcopy(dense), dense, tiny_images(20), diverging, group=group),
    }.items():
        try:
            work()
            found[name] = ""
        except UserError as error:
            found[name] = str(error)
    told = group.all_json(found)
    assert all(other == found for other in told), told
    return found


def commands(group: Group, folder: Path) -> dict:
    """`moee extract` and `moee finetune` as functions, on digits. Random weights: those of rank 0 count."""
    torch.manual_seed(group.rank)
    spec = tiny_spec(num_classes=0)
    given = dict(clustering="kmeans", clusters=3, cluster_tokens=600, tokens=1200, refit_tokens=2000, refit_target="stream")
    config = make_recipe(values={**given, "attention_macs": 0.8})
    run_extract(spec, "digits", config, folder / "extracted", group=group)
    tuned = run_finetune(
        folder / "extracted", FinetuneConfig(epochs=1, lr=1e-4, batch_size=128), folder / "tuned", group=group
    )
    return {"losses": tuned.info["stages"]["tuned"]["losses"]} if group.leader else {}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("moee").setLevel(logging.ERROR)
    refit.PART_TOKENS = 16  # so few tokens would be one part, and one rank's
    passes: list[int] = []
    refit.InStep = narrowing.InStep = lambda works: passes.append(len(works)) or InStep(works)
    with joined(timeout_s=120) as group:
        torch.manual_seed(0)
        dense = load_model(tiny_spec())
        results = {
            "experts": experts(group, folder, dense),
            "few": few(group, folder),
            "sample": sample(group, folder, dense),
            "tunings": tunings(group, folder, dense),
            "refusals": refusals(group, dense),
            "commands": commands(group, folder),
        }
        results["passes"] = group.all_json(sum(passes))
        if group.leader:
            (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
