"""Options of MoEfication."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moee.calibrate.options import CalibrationOptions
from moee.config import Count


class MoeficationOptions(CalibrationOptions):
    """How the neurons are divided, and how a token finds its experts."""

    experts: Count = Field(description="experts a layer: equal shares of its neurons")
    top_k: Count = Field(1, description="experts that each token is routed to")
    split: Literal["weights", "coactivation"] = Field(
        "weights", description="what neurons are divided by: clusters of fc1's rows, or how often two are active together"
    )
    selector: Literal["centre", "router"] = Field(
        "centre", description="how a token finds its experts: their parameters' centre, or a linear map that is fitted"
    )
    compensation: Literal["none", "mean"] = Field(
        "mean", description="experts that a token does not get are ignored, or replaced by their mean output"
    )

    @model_validator(mode="after")
    def _within(self) -> MoeficationOptions:
        if self.top_k > self.experts:
            raise ValueError(f"method moefication needs --top-k (now {self.top_k}) within --experts (now {self.experts})")
        return self
