"""`extract`, `finetune` and `plan` of a small model on CUDA against the same commands on the CPU.

The digits, a small ViT with random weights. The devices round differently, so near ties fall otherwise here and there; what is
compared are the features of both models on the same images, their multiplications, and what the plans chose. A rehearsal on the
CPU compares its results with themselves: it shows that the commands run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from moee.artifacts import checkpoint
from moee.data.image_set import TensorSet
from moee.measure.evaluation import run

COSINE = 0.98  # of the features of one image, the least
MACS, PLAN = 0.02, 0.03  # how far shares of the multiplications, and cosines of plans, may be apart
IMAGES = 64
SMALL = ("--tokens", "1500", "--refit-tokens", "1500", "--cluster-tokens", "600")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moee-against-") as place:
        folder = Path(place)
        weights = write_weights(folder / "model.safetensors")
        devices = {"reference": "cpu", "device": args.device} if args.device != "cpu" else {"device": "cpu"}
        with ThreadPoolExecutor(4) as pool:
            jobs = {}
            for name, device in devices.items():
                jobs[name] = [pool.submit(work, weights, folder / name, device) for work in (models, plan)]
            said = {name: [job.result() for job in both] for name, both in jobs.items()}["device"]
        checks = compared(folder / next(iter(devices)), folder / "device", said, args.device)
    body = {"passed": all(check["passed"] for check in checks), "checks": checks, "device": args.device}
    args.out.write_text(json.dumps(body, indent=1), encoding="utf-8")
    for check in checks:
        print(check, flush=True)
    return 0


def write_weights(path: Path) -> Path:
    """Weights that no pretrained model has, drawn wide enough for MLPs to matter."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path


def models(weights: Path, folder: Path, device: str) -> str:
    """Extract into `folder/cut` and tune into `folder/tuned`; the commands' first line that names the device."""
    source = ["test_vit", "--weights", str(weights), "--img-size", "32", "--data", "digits"]
    said = moee("extract", *source, "--clusters", "4", *SMALL, "--device", device, "--out", str(folder / "cut"))
    tune = ("--epochs", "1", "--lr", "1e-5")
    moee("finetune", str(folder / "cut"), *tune, "--device", device, "--out", str(folder / "tuned"))
    return said


def plan(weights: Path, folder: Path, device: str) -> str:
    """Plan into `folder/plan`."""
    source = ["test_vit", "--weights", str(weights), "--img-size", "32", "--data", "digits"]
    tried = ("--methods", "kmeans-8,static", "--targets", "0.8,0.6", "--allocations", "share", "--min-cosine", "0.5")
    return moee("plan", *source, *tried, *SMALL, "--torch-device", device, "--out", str(folder / "plan"))


def moee(*arguments: str) -> str:
    """Run a command; its output. Raises RuntimeError if it fails."""
    done = subprocess.run([sys.executable, "-m", "exporter.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"moee {arguments[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stderr + done.stdout


def compared(reference: Path, device: Path, said: list[str], name: str) -> list[dict[str, Any]]:
    """The checks: each command ran where it should, and both devices' results are alike."""
    where = "computing on cuda" if name == "cuda" else "computing on the CPU"
    checks: list[dict[str, Any]] = [{"name": f"the commands computed on {name}", "passed": all(where in text for text in said)}]
    for stage in ("cut", "tuned"):
        loaded = [checkpoint.load(folder / stage) for folder in (reference, device)]
        held_out = loaded[0].record.images("val")
        first = torch.stack([held_out.load(i) for i in range(IMAGES)])
        images = TensorSet("digits", first, held_out.labels[:IMAGES], held_out.classes)
        features = [run(model.model, images).features for model in loaded]
        cosine = float(torch.nn.functional.cosine_similarity(*features).min())
        costs = [_stages(folder / stage)[-1].get("cost") for folder in (reference, device)]
        shares = [cost["moee"]["macs"] / cost["dense"]["macs"] for cost in costs if cost]
        apart = max(shares) - min(shares) if len(shares) == 2 else 0.0
        passed = cosine > COSINE and apart < MACS
        checks.append({"name": stage, "passed": passed, "least_cosine": cosine, "macs": shares})
    plans = [json.loads((folder / "plan" / "plan.json").read_text(encoding="utf-8")) for folder in (reference, device)]
    points = [{(p["method"], p["allocation"], round(p["macs"], 2)): p["cosine"] for p in found["points"]} for found in plans]
    both = points[0].keys() & points[1].keys()
    apart = max((abs(points[0][key] - points[1][key]) for key in both), default=1.0)
    winners = [found["winner"]["method"] for found in plans]
    alike = len(both) >= 0.7 * max(map(len, points)) and apart < PLAN and winners[0] == winners[1]
    checks.append({"name": "plan", "passed": alike, "winners": winners, "same_points": len(both), "cosines_apart": apart})
    return checks


def _stages(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "moee.json").read_text(encoding="utf-8"))["info"]["stages"].values())


if __name__ == "__main__":
    sys.exit(main())
