"""Throughput of calibration against the plain forward pass, interleaved, on dinov2-s and the built-in photographs."""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from exporter.pretrained import resolve
from moee.calibrate.calibration import collect_tokens
from moee.config import PAPER_TOKENS
from moee.data.image_set import batches
from moee.data.sources import load_data
from moee.data.transform import model_transform
from moee.mlps.find import find_ffns
from moee.models.model import load_model
from moee.space.limits import FORWARD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    model = load_model(resolve("dinov2-s", "photos"))
    data = load_data("photos:8", model_transform(model))
    ffns = find_ffns(model).ffns
    times = np.zeros((2, rounds))
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            started = time.perf_counter()
            if which == 0:
                with torch.inference_mode():
                    for batch in batches(data, FORWARD):
                        model(batch.images)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    collect_tokens(model, ffns, data, Path(folder), PAPER_TOKENS)
            times[which, i] = time.perf_counter() - started
    ratios = times[0] / times[1]
    print(f"{len(data)} images, {rounds} rounds, {torch.get_num_threads()} threads, measured on CPU")
    print(f"plain forward {np.median(times[0]):.2f} s, calibration {np.median(times[1]):.2f} s")
    print(f"calibration throughput / forward throughput: p50 {np.median(ratios):.3f}, p5 {np.percentile(ratios, 5):.3f}")


if __name__ == "__main__":
    main()
