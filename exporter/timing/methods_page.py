"""docs/results/methods_table.md: which models and domains it has, and what stands above its tables."""

from __future__ import annotations

from moee.planning.table import SCALE, TARGETS, Case
from moee.train.scratch import SCRATCH

CASES = (
    Case("dinov2-s", "photo-crops", "DINOv2 ViT-S/14 at 112 pixels; 20 photographs told apart by crops."),
    Case("dinov2-s", "digits", "DINOv2 ViT-S/14 at 112 pixels; scikit-learn's digits."),
    *(Case(name, "digits", f"{recipe.said}, trained here on the digits.") for name, recipe in SCRATCH.items()),
)
HEADER = """# Methods side by side

Made by `make results-methods`, which runs the commands below and goes on where it was stopped. Rows that were not made are not
here. Budgets: {targets} of the dense MACs. No gradient step anywhere; what tuning brings stands in [overview.md](overview.md).
One run a cell (seed 0): differences of a few thousandths of cosine say little, and accuracies whose intervals overlap rank
nothing. All figures are of held-out images, which nothing was fitted on. *Measured on CPU*: {cpu}.

Every method sees {tokens:,} calibration tokens a layer, as many in a refit, {sensitivity:,} in a sensitivity, {cluster:,} are
clustered; low-rank maps and CLEAR-MoE see 200 images. *Magnitude of the weights* is the group magnitude
of torch-pruning's DepGraph, *Taylor* its importance, of random projections of the output in the place of a loss. *Plugin*:
whether TensorRT needs ours. What each method computes: [method.md](../method.md). Each command takes a folder of its own as DIR.
"""


def header(cpu: str) -> str:
    """What stands above the tables."""
    return HEADER.format(
        targets=", ".join(f"−{100 * (1 - target):.0f} %" for target in TARGETS), cpu=cpu, tokens=SCALE["tokens"],
        sensitivity=SCALE["sensitivity_tokens"], cluster=SCALE["cluster_tokens"],
    )  # fmt: skip
