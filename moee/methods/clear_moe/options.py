"""Options of CLEAR-MoE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moee.config import MOST_COUNT, MOST_FACTOR, Count, Options, Seed

DEFAULT_ENERGY = 0.98  # of each map's output variance, when neither rank nor budget is given


class DecompositionOptions(Options):
    """What maps are decomposed on, and how; `lowrank` has these options too."""

    seed: Seed = Field(0, description="seed of everything that is drawn")
    exclude: tuple[str, ...] = Field((), description="MLP or block that stays dense, such as blocks.3; may be repeated")
    calibration_images: Count = Field(200, description="training images that are looked at")
    tokens: int = Field(16_384, ge=2, le=MOST_COUNT, description="calibration tokens a layer")
    metric: Literal["output", "plain"] = Field("output", description="whether the errors of the maps are weighed by their effect")
    compensation: Literal["mean", "refit"] = Field("refit", description="whether the down maps are refitted to the basis first")
    refit_lambda: float = Field(
        0.01, gt=0, le=MOST_FACTOR, description="ridge of the refit, as a share of the Gram matrix's mean diagonal"
    )


class ClearOptions(DecompositionOptions):
    """How layers are chosen and decomposed. Ranks come from one of `rank` (by hand), `energy` or `target_macs`.

    `target_macs` together with `rank` selects layers: the best scored ones, until the model is within the budget.
    """

    experts: Count = Field(4, description="experts a layer: clusters of its inputs")
    rank: Count | None = Field(
        None, description="rank of the basis that a layer's experts share, of both maps; needs --residual-rank "
        "(default: by --energy or --target-macs)",
    )  # fmt: skip
    residual_rank: int | None = Field(
        None, ge=0, le=MOST_COUNT, description="rank of each expert beside the basis (default: divided by the least error)"
    )
    energy: float | None = Field(
        None, gt=0, le=1,
        description=f"share of each map's output variance that is kept (default: {DEFAULT_ENERGY}, without a rank or target)",
    )  # fmt: skip
    target_macs: float | None = Field(
        None, gt=0, lt=1,
        description="MACs of the result as a share of the dense model's; ranks, or with --rank layers, are then found",
    )  # fmt: skip
    layers: Count | None = Field(None, description="how many layers are cut, best scores first (default: all that pay)")
    router: Literal["linear", "mlp", "centroid", "random"] = Field("linear", description="how a token finds its expert")
    router_width: Count = Field(32, description="hidden units of the mlp router")
    score: bool = Field(True, description="score the layers, which a run over all of them does not need")

    @model_validator(mode="after")
    def _consistent(self) -> ClearOptions:
        if self.energy is not None and (self.rank is not None or self.target_macs is not None):
            raise ValueError("--energy chooses the ranks itself; give it without --rank and --target-macs")
        if self.rank is not None and self.target_macs is not None and self.layers is not None:
            raise ValueError("--rank with --target-macs selects the layers; give it without --layers")
        if self.rank is not None and self.residual_rank is None:
            raise ValueError("--rank by hand needs --residual-rank too (0 for none)")
        if self.rank is None and self.residual_rank is not None and self.energy is None and self.target_macs is None:
            raise ValueError("--residual-rank needs --rank, --energy or --target-macs beside it")
        if self.metric == "plain" and self.target_macs is not None and self.rank is None:
            raise ValueError(
                "--target-macs holds the errors of all maps against each other, and --metric plain leaves them in unlike units; "
                "use --metric output, or give --rank and --residual-rank too"
            )
        if self.calibration_images < self.experts:
            raise ValueError(
                f"--calibration-images {self.calibration_images} is smaller than the {self.experts} experts; give more images"
            )
        if not self.score and (self.layers is not None or (self.rank is not None and self.target_macs is not None)):
            raise ValueError("layers are selected by their scores; leave score on")
        return self

    @property
    def kept_energy(self) -> float | None:
        """The share of variance that chooses the ranks, or None if they are given or follow from a budget."""
        if self.rank is not None or self.target_macs is not None:
            return None
        return self.energy or DEFAULT_ENERGY
