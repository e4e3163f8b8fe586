"""Options of CORP."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moee.calibrate.options import CalibrationOptions


class CorpOptions(CalibrationOptions):
    """How much of each MLP and head stays."""

    keep: float = Field(
        0.5, gt=0, le=1, description="share of each MLP's neurons, and of each head's query and key dimensions (half at least)"
    )
    target_macs: float | None = Field(
        None, gt=0, lt=1, description="MACs of the result as a share of the dense model's; --keep is then found"
    )
    corp_attention: Literal["cut", "whole"] = Field("cut", description="whether heads lose dimensions too")
