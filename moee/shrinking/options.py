"""What `moee shrink` is told."""

from __future__ import annotations

from pydantic import Field, model_validator

from moee.config import MOST_FACTOR, Count, Options, Seed


class ShrinkConfig(Options):
    """How the experts of a model become fewer."""

    experts: Count | None = Field(None, description="merge the experts of a layer until it has so many")
    specialise: bool = Field(
        False, description="drop the experts that the images of --data do not need, and the neurons that only they hold"
    )
    tolerance: float = Field(
        0.01, ge=0, lt=1, description="share of a layer's output norms that dropped experts may have had together"
    )
    unprotected: bool = Field(False, description="merge and drop experts with extreme outputs too")
    tokens: Count = Field(8_000, description="tokens a layer on which experts are compared")
    refit_tokens: Count = Field(41_600, description="tokens a layer that the refit of merged layers may use")
    refit_lambda: float | None = Field(
        None, gt=0, le=MOST_FACTOR, description="ridge of the refit, over the mean diagonal (default: by held-out tokens)"
    )
    seed: Seed = Field(0, description="seed of the tokens that are drawn")

    @model_validator(mode="after")
    def _asked_for_something(self) -> ShrinkConfig:
        if self.experts is None and not self.specialise:
            raise ValueError("nothing is asked for; give --experts, --specialise or both")
        merging = self.experts is not None
        needs = {"tolerance": ("--specialise", self.specialise), "refit_tokens": ("--experts", merging)}
        for name, (flag, given) in (needs | {"refit_lambda": ("--experts", merging)}).items():
            if not given and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"--{name.replace('_', '-')} does nothing without {flag}; give that too, or leave it out")
        return self
