"""Throughput and peak memory of the steps that several ranks share, on dinov2-s and digits. Start it with torchrun."""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import torch

from exporter.pretrained import resolve
from moee.calibrate.calibration import collect_tokens, gather_tokens
from moee.config import FinetuneConfig
from moee.data.image_set import TensorSet
from moee.data.sources import load_data
from moee.data.transform import model_transform
from moee.measure.evaluation import run
from moee.methods.convert import extract
from moee.methods.recipe import method_options
from moee.mlps.find import find_ffns
from moee.models.model import load_model
from moee.parallel.joining import joined
from moee.stages.results import peak_memory_bytes
from moee.train.finetuning import finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8000, help="calibration tokens a layer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1)
    args = parser.parse_args()
    with joined() as group:
        dense = load_model(resolve("dinov2-s", "digits"))
        whole = load_data("digits", model_transform(dense))
        data = TensorSet("digits", whole.images[: args.images].contiguous(), whole.labels[: args.images], 10)  # type: ignore[attr-defined]
        del whole
        ffns, seconds = find_ffns(dense).ffns, {}
        moee = copy.deepcopy(dense)
        config = method_options(
            clustering="random", clusters=8, tokens=2000, cluster_tokens=2000, compensation="mean", keep=0.9
        )
        small = TensorSet("digits", data.images[:40], data.labels[:40], 10)
        extract(moee, small, config, group=group)

        def timed(name: str, work) -> None:
            group.barrier()
            started = time.perf_counter()
            result = work()
            group.barrier()
            seconds.setdefault(name, []).append(round(time.perf_counter() - started, 2))
            return result

        tuning = FinetuneConfig(epochs=1, batch_size=32, lr=1e-7, checkpointing=args.checkpointing, accumulate=args.accumulate)
        teacher = torch.zeros(len(data), dense.num_features)
        memory = {"start": group.all_json(peak_memory_bytes())}
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                own = timed("calibrate", lambda f=folder: collect_tokens(dense, ffns, data, Path(f), args.tokens, group=group))
                if not group.alone:
                    timed("gather tokens", lambda o=own: gather_tokens(o, group))
            memory["calibrate"] = group.all_json(peak_memory_bytes())
            timed("evaluate", lambda: run(moee, data, group=group))
            memory["evaluate"] = group.all_json(peak_memory_bytes())
            student = copy.deepcopy(moee)
            timed("epoch", lambda s=student: finetune(s, dense, data, tuning, teacher=teacher, group=group))
            memory["epoch"] = group.all_json(peak_memory_bytes())
        if group.leader:
            mib = {step: [round(value / 2**20) for value in values] for step, values in memory.items()}
            print(json.dumps({"world": group.world, "images": args.images, "seconds": seconds, "peak_mib": mib}))


if __name__ == "__main__":
    main()
