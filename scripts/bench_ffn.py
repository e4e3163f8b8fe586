"""Time each routed layer of an artifact alone against its dense MLP, in ONNX Runtime on the CPU.

python scripts/bench_ffn.py runs/demo/tuned --tokens 2056
"""

import argparse

from exporter.timing.ffn_bench import ffn_speeds, overall
from moee.artifacts import checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("artifact")
parser.add_argument("--tokens", type=int, default=2056)
parser.add_argument("--runs", type=int, default=40)
parser.add_argument("--threads", type=int)
args = parser.parse_args()
moee = checkpoint.load(args.artifact)
data = moee.record.images("val")
rows = ffn_speeds(moee, data, args.tokens, args.runs, args.threads)
for r in rows:
    share = r.speedup / r.ideal
    print(f"{r.name}: {r.tokens} tokens, dense {r.dense_ms:.2f} ms, MoEE {r.moee_ms:.2f} ms", end=", ")
    print(f"{r.speedup:.2f}x of {r.ideal:.2f}x = {share:.2f}")
speed, ideal = overall(rows)
print(f"all layers: {speed:.2f}x of {ideal:.2f}x = {speed / ideal:.2f}")
