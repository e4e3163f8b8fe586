"""Token merging as a method: alone, or a step before one that cuts MLPs. `moee.tokens` does the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from moee.config import Count, Options, Seed
from moee.methods.base import Method, Part, Variant

if TYPE_CHECKING:
    from torch import nn

    from moee.layers.report import LayerReport
    from moee.methods.context import Context

USUAL = 0.7  # of the MACs, where nobody says how many tokens are to merge


class TokensOptions(Options):
    """How many tokens are merged."""

    seed: Seed = Field(0, description="seed by which the images are divided; merging itself draws nothing")
    token_macs: float | None = Field(
        None, gt=0, le=1,
        description="merge alike tokens until the model costs this share of its MACs; --target-macs counts what that saves "
        f"(default: {USUAL} with --method tokens, else none are merged)",
    )  # fmt: skip
    merge_tokens: Count | None = Field(None, description="merge as many tokens in every block, instead of --token-macs")

    @model_validator(mode="after")
    def _one_of_them(self) -> TokensOptions:
        if self.token_macs is not None and self.merge_tokens is not None:
            raise ValueError("--token-macs finds how many tokens merge, and --merge-tokens says it; leave one of them out")
        return self

    @property
    def share(self) -> float:
        """The share of the MACs that merging leaves, where the number of tokens is not given."""
        return USUAL if self.token_macs is None else self.token_macs


class TokensMethod(Method[TokensOptions]):
    name, options = "tokens", TokensOptions
    cuts: ClassVar[Part] = "tokens"
    gated, calibrated = True, False
    summary = "alike tokens merged from block to block (ToMe), with no training and no plugin; alone or beside another method"
    variants: ClassVar = {"tokens": Variant({})}

    def changes(self, options: TokensOptions) -> bool:
        return options.token_macs != 1

    def check(self, model: nn.Module, shape: tuple[int, int, int], options: TokensOptions) -> None:
        """How many merge is not judged where nobody says it: a plan finds that."""
        from moee.tokens.schedule import block_costs

        if options.token_macs is None and options.merge_tokens is None:
            block_costs(model, shape)
        else:
            schedule(model, shape, options)

    def saves(self, model: nn.Module, shape: tuple[int, int, int], options: TokensOptions) -> tuple[int, int]:
        """What merging saves of a dense model."""
        from moee.tokens.schedule import block_costs

        costs, merged = block_costs(model, shape), schedule(model, shape, options)
        saved = costs.macs([0] * len(merged)) - costs.macs(merged)
        return saved, saved

    def within(
        self, options: TokensOptions, target: float, model: nn.Module, shape: tuple[int, int, int]
    ) -> TokensOptions:
        """`target` is a share of the MACs before anything was done to the model."""
        from moee.measure.metrics import dense_macs, original_macs

        share = round(target * original_macs(model, shape) / dense_macs(model, shape), 6)
        made = options.model_copy(update={"token_macs": min(share, 1.0), "merge_tokens": None})
        schedule(model, shape, made)
        return made

    def convert(self, model: nn.Module, options: TokensOptions, context: Context) -> Sequence[LayerReport]:
        """Nothing is learned from images; all ranks do the same. No report: an MLP stays as it is."""
        from moee.data.transform import model_transform
        from moee.tokens.block import install_merging

        install_merging(model, schedule(model, model_transform(model).shape, options))
        return []


def schedule(model: nn.Module, shape: tuple[int, int, int], options: TokensOptions) -> list[int]:
    """Tokens that each block merges. Raises `UserError` for a model whose tokens cannot be merged, and for more tokens than a
    block has; `OutOfReach` for a share that no number of tokens meets."""
    from moee.measure.metrics import dense_macs
    from moee.tokens.schedule import block_costs, schedule_of, schedule_with

    costs = block_costs(model, shape)
    if options.merge_tokens is not None:
        return schedule_with(costs, options.merge_tokens)
    return schedule_of(costs, dense_macs(model, shape), options.share)
