"""Configuration of CLEAR-MoE: frozen, validated, JSON round trip."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from moee.config import MOST_COUNT, MOST_FACTOR, Count, MethodOptions, Seed

DEFAULT_ENERGY = 0.98  # of each map's output variance, when neither rank nor budget is given


class ClearConfig(MethodOptions):
    """How layers are chosen and decomposed. Ranks come from one of `rank` (by hand), `energy` or `target_macs`.

    `target_macs` together with `rank` selects layers: the best scored ones, until the model is within the budget.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["clear-moe"] = "clear-moe"
    seed: Seed = 0
    exclude: tuple[str, ...] = ()
    experts: Count = Field(4, description="clusters of each layer's inputs")
    rank: Count | None = Field(None, description="of the shared basis, both maps")
    residual_rank: int | None = Field(
        None, ge=0, le=MOST_COUNT, description="of each expert; None divides the rank by the least error"
    )
    energy: float | None = Field(None, gt=0, le=1, description="share of each map's output variance that is kept")
    target_macs: float | None = Field(None, gt=0, lt=1, description="share of the dense model's MACs")
    layers: Count | None = Field(None, description="how many layers, best scores first; None converts all that pay")
    router: Literal["linear", "mlp", "centroid", "random"] = "linear"
    router_width: Count = Field(32, description="hidden units of the mlp router")
    calibration_images: Count = 200
    tokens: int = Field(16_384, ge=2, le=MOST_COUNT, description="calibration tokens a layer")
    metric: Literal["output", "plain"] = "output"
    refit: bool = True
    refit_lambda: float = Field(0.01, gt=0, le=MOST_FACTOR, description="share of the Gram matrix's mean diagonal")
    score: bool = Field(True, description="off: skip the layer scores, which a run over all layers does not need")

    @model_validator(mode="after")
    def _consistent(self) -> ClearConfig:
        if self.energy is not None and (self.rank is not None or self.target_macs is not None):
            raise ValueError("--energy chooses the ranks itself; give it without --rank and --target-macs")
        if self.rank is not None and self.target_macs is not None and self.layers is not None:
            raise ValueError("--rank with --target-macs selects the layers; give it without --layers")
        if self.rank is not None and self.residual_rank is None:
            raise ValueError("--rank by hand needs --residual-rank too (0 for none)")
        if self.rank is None and self.residual_rank is not None and self.energy is None and self.target_macs is None:
            raise ValueError("--residual-rank needs --rank, --energy or --target-macs beside it")
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
