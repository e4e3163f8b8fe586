"""Options of low-rank maps."""

from __future__ import annotations

from pydantic import Field

from moee.methods.clear_moe.options import DecompositionOptions


class LowRankOptions(DecompositionOptions):
    """The ranks: `target_macs` finds them layer by layer, `keep` gives every MLP the same share of its MACs."""

    keep: float = Field(
        0.5, gt=0, le=1, description="share of each MLP's MACs that stays, which gives the rank of both of its maps"
    )
    target_macs: float | None = Field(
        None, gt=0, lt=1,
        description="MACs of the result as a share of the dense model's; the ranks of each layer's maps are then found (with "
        "--metric plain every MLP keeps one share)",
    )  # fmt: skip
