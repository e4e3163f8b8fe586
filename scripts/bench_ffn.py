"""Time the layers of artifacts alone against their dense MLPs, all in turns, in ONNX Runtime on the CPU.

python scripts/bench_ffn.py runs/static runs/routed --batches 1,8,32
"""

import argparse

from exporter.timing.ffn_bench import layers_side_by_side
from moee.artifacts import checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("artifacts", nargs="+", help="folders of moee extract or finetune, cut from one dense model")
parser.add_argument("--batches", default="1,8,32", help="images of a batch, separated by commas")
parser.add_argument("--runs", type=int, default=40)
parser.add_argument("--threads", type=int)
args = parser.parse_args()
models = {folder: checkpoint.load(folder) for folder in args.artifacts}
data = next(iter(models.values())).record.images("val")
for row in layers_side_by_side(models, data, [int(part) for part in args.batches.split(",")], args.runs, args.threads):
    v = row.verdict
    print(f"batch {row.batch}, {row.tokens} tokens, {row.name}: {v.ratio:.2f}x ({v.low:.2f} to {v.high:.2f})", end=" ")
    print(f"of {row.ideal:.2f}x = {v.ratio / row.ideal:.2f}")
