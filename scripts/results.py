"""Makes docs/results/speed.md: cuts and exports the models unless they are there, times them in turns, and writes the page.

python scripts/results.py --work runs/results --out docs/results/speed.md
"""

import argparse
import sys
from pathlib import Path

from exporter.cli import main
from exporter.engines.environment import environment
from exporter.timing.ffn_bench import layers_side_by_side
from exporter.timing.results_page import MODELS, STEPS, page
from exporter.timing.side_by_side import BATCHES, side_by_side
from moee.artifacts import checkpoint
from moee.data.image_set import batches
from moee.parallel.machine import usable_cpus
from moee.progress import to_stderr

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--work", type=Path, default=Path("runs/results"))
parser.add_argument("--out", type=Path, default=Path("docs/results/speed.md"))
parser.add_argument("--duration", type=float, default=20.0, help="seconds of rounds a batch size")
args = parser.parse_args()
for folder, command in STEPS:
    if not (args.work / folder).exists() and (code := main(command.format(work=args.work).split())) != 0:
        sys.exit(code)
models = {name: checkpoint.load(args.work / name) for name in MODELS}
data = models["static"].record.images("val")
report, before = to_stderr(), environment()
images = next(batches(data, max(BATCHES))).images.numpy()
exports = [args.work / f"{name}-export" for name in models]
whole = side_by_side(exports, images, BATCHES, duration_s=args.duration, report=report)
layers = layers_side_by_side(models, data, BATCHES, report=report)
args.out.write_text(page(whole, layers, before, environment(), usable_cpus()), encoding="utf-8")
