"""Narrower attention heads as a method among others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from moee.config import Count, Options, Seed, Views
from moee.methods.base import Method, Part

if TYPE_CHECKING:
    from torch import nn

    from moee.layers.report import LayerReport
    from moee.methods.context import Context


class HeadsOptions(Options):
    """How far the heads are narrowed, and what is seen for it."""

    seed: Seed = Field(0, description="seed of everything that is drawn")
    attention_macs: float = Field(
        cast(Any, None), gt=0, le=1,  # refused below, after the bounds of the others
        description="narrow the attention's heads to this share of its MACs; --target-macs counts what that saves "
        "(default: they stay)",
    )  # fmt: skip
    attention_heads: Literal["separate", "equal"] = Field(
        "separate", description="whether a layer's queries and keys may have another width than its values"
    )
    attention_probes: Count = Field(48, description="images on which each width of each attention is tried")
    attention_tokens: Count = Field(120_000, description="tokens that each attention is fitted on, at most")
    collages: Views = Field(0, description="collages a training image that calibration sees beside it")

    @model_validator(mode="after")
    def _asked_for(self) -> HeadsOptions:
        if self.attention_macs is None:
            own = [f"--{name.replace('_', '-')}" for name in sorted(self.model_fields_set) if name.startswith("attention_")]
            wanted = "need --attention-macs, the share of the attention's MACs that stays; give it"
            raise ValueError(f"{' and '.join(own)} {wanted}" if own else f"narrower heads {wanted}")
        return self


class HeadsMethod(Method[HeadsOptions]):
    name, options = "heads", HeadsOptions
    cuts: ClassVar[Part] = "attention"
    summary = "fewer dimensions in the attention's heads, with any method that cuts MLPs"

    def changes(self, options: HeadsOptions) -> bool:
        return options.attention_macs != 1

    def check(self, model: nn.Module, shape: tuple[int, int, int], options: HeadsOptions) -> None:
        from moee.methods.heads.widths import check_share

        check_share(model, shape, options.attention_macs)

    def saves(self, model: nn.Module, shape: tuple[int, int, int], options: HeadsOptions) -> tuple[int, int]:
        """Widths go in steps, so that a layer more than is needed may be narrowed."""
        from moee.methods.heads.widths import narrowest_and_full

        costs = narrowest_and_full(model, shape)
        needed = (1 - options.attention_macs) * sum(full for _, full in costs)
        return int(needed), int(needed) + max(full - low for low, full in costs)

    def convert(self, model: nn.Module, options: HeadsOptions, context: Context) -> Sequence[LayerReport]:
        """What was measured of a model's widths serves every share: it is left in the context."""
        from moee.data.transform import model_transform
        from moee.data.validation import fitted_part
        from moee.data.views import widened
        from moee.methods.heads.narrowing import narrow, width_losses
        from moee.methods.heads.widths import check_share
        from moee.space.machine import give_back

        share = options.attention_macs
        if share == 1:
            return []
        equal, transform, group = options.attention_heads == "equal", model_transform(model), context.group
        seen = widened(fitted_part(context.data), transform, 0, options.collages, options.seed)
        trials = {"probes": options.attention_probes, "tokens": options.attention_tokens}
        key = ("widths", equal, options.collages, options.seed, *trials.values())
        with group.agreed():
            check_share(model, transform.shape, share)  # before minutes of trials
        if key not in context.left:
            context.left[key] = width_losses(model, seen, transform.shape, equal, context.report, group=group, **trials)
            give_back()
        narrow(
            model, seen, transform.shape, share, equal, report=context.report, losses=context.left[key], group=group, **trials
        )
        give_back()
        return []
