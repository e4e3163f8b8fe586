"""What calibration sees, which neurons an expert keeps, and how what they drop is made good."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moee.clustering.options import ClusteringOptions
from moee.config import MOST_FACTOR, PAPER_TOKENS, Count, Options, Seed, Views

# criteria by gradients of the model's output, whose figures of all layers are of one kind
MEASURED = ("sensitivity", "taylor", "atomic")
MOST_MULTIPLE = 1024
STEPS_OF_WIDTH = 8  # that a layer's width can take at least, however large a multiple is asked for


class CalibrationOptions(Options):
    """The tokens that a method looks at."""

    seed: Seed = Field(0, description="seed of everything that is drawn")
    exclude: tuple[str, ...] = Field((), description="MLP or block that stays dense, such as blocks.3; may be repeated")
    tokens: Count = Field(PAPER_TOKENS, description="calibration tokens a layer")
    collages: Views = Field(0, description="collages a training image that calibration and refit see beside it")


class SelectionOptions(Options):
    """Which neurons stay: those that hold the share `keep` of a criterion, in each expert with `allocation` expert, over all
    layers and experts together with `allocation` model. `target_macs` finds the share that meets a cost instead."""

    criterion: Literal["sensitivity", "taylor", "atomic", "output_variance", "variance", "magnitude", "weight", "random"] = Field(
        "output_variance", description="what neurons are ranked by"
    )
    keep: float = Field(
        0.95, gt=0, le=1,
        description="share of the criterion that the kept neurons hold; takes the place of a preset's --target-macs",
    )  # fmt: skip
    target_macs: float | None = Field(
        None, gt=0, lt=1,
        description="MACs of the result as a share of the dense model's; --keep is then found (default: as --keep leaves them)",
    )  # fmt: skip
    mlp_floor: float | None = Field(
        None, gt=0, lt=1,
        description="share of the cut MLPs' MACs that stays at least, although the result then costs more than --target-macs",
    )  # fmt: skip
    neurons: Literal["ranked", "eliminated"] = Field(
        "ranked",
        description="which neurons an expert keeps, once their number is known: the first by the criterion, or those that are "
        "left when the refit makes good each that is removed, which takes longer and misses less of a layer's output",
    )  # fmt: skip
    width_multiple: int = Field(
        1, ge=1, le=MOST_MULTIPLE,
        description="each expert keeps a multiple of so many neurons, as tensor cores (8, 16 for int8) and vector units want it; "
        "less in layers of under 8 times as many",
    )  # fmt: skip
    allocation: Literal["expert", "model"] = Field(
        "expert",
        description="whether each expert keeps its share, or all layers share one threshold, which needs --criterion sensitivity",
    )
    mac_time: tuple[str, ...] = Field(
        (),
        description="how long a MAC of an MLP takes, relative to the others', such as blocks.3.mlp=1.5, for --allocation model; "
        "may be repeated (default: all alike)",
    )  # fmt: skip
    objective: Literal["output", "tokens", "both"] = Field(
        "both",
        description="what --criterion sensitivity, taylor and atomic are measured on: the output, the tokens of the last feature "
        "map, or both",
    )
    sensitivity_tokens: Count = Field(32_768, description="tokens a layer that the sensitivity is measured on")

    @model_validator(mode="after")
    def _bounded(self) -> SelectionOptions:
        if self.mlp_floor is not None and self.target_macs is None:
            raise ValueError("--mlp-floor bounds what --target-macs cuts; give that too")
        return self

    @model_validator(mode="after")
    def _timed(self) -> SelectionOptions:
        if self.mac_times() and self.allocation != "model":
            raise ValueError("--mac-time holds layers against each other; use it with --allocation model")
        return self

    def idle(self) -> dict[str, str]:
        needed = self.criterion in MEASURED or self.neurons == "eliminated"
        measured = f"--criterion {', '.join(MEASURED)} or --neurons eliminated, and the criterion is {self.criterion}"
        found = {} if needed else dict.fromkeys(("objective", "sensitivity_tokens"), measured)
        return {**super().idle(), **found}

    def multiple_of(self, hidden: int) -> int:
        """What the number of neurons that an expert keeps is a multiple of, in an MLP of `hidden`: `width_multiple`, halved until
        the layer has `STEPS_OF_WIDTH` widths to choose from."""
        multiple = self.width_multiple
        while multiple > 1 and multiple * STEPS_OF_WIDTH > hidden:
            multiple //= 2
        return multiple

    def mac_times(self) -> dict[str, float]:
        """Times of a MAC by the MLP's name. Raises `ValueError` for what is no name with a factor."""
        found: dict[str, float] = {}
        for text in self.mac_time:
            name, sign, factor = text.rpartition("=")
            try:
                found[name] = float(factor)
            except ValueError:
                sign = ""
            if not sign or not name or not 1 / MOST_FACTOR <= found[name] <= MOST_FACTOR:
                raise ValueError(f"--mac-time is an MLP and a positive factor, such as blocks.3.mlp=1.5 (came {text!r})")
        return found

    @model_validator(mode="after")
    def _comparable(self) -> SelectionOptions:
        if self.allocation == "model" and self.criterion not in MEASURED:
            raise ValueError(
                f"--allocation model compares neurons across layers, so it needs --criterion sensitivity (came {self.criterion})"
            )
        return self


class RefitOptions(Options):
    """How the down maps make good what was dropped."""

    compensation: Literal["none", "mean", "refit"] = Field(
        "refit", description="dropped neurons are ignored, replaced by their mean, or made good by a refit of the down maps"
    )
    refit_lambda: float | None = Field(
        None, gt=0, le=MOST_FACTOR,
        description="ridge of --compensation refit, as a share of the Gram matrix's mean diagonal (default: chosen by held-out "
        "tokens)",
    )  # fmt: skip
    refit_target: Literal["stream", "layer"] = Field(
        "layer",
        description="what the refit brings a layer to: the dense model's residual stream behind it, so that it makes good what "
        "earlier layers lost too, or the dense MLP's output on the layer's own inputs",
    )  # fmt: skip
    refit_tokens: Count = Field(PAPER_TOKENS, description="tokens a layer that --compensation refit may use")
    augment: Views = Field(0, description="random views of each training image that the refit sees beside it")

    def idle(self) -> dict[str, str]:
        refit = f"--compensation refit, and it is {self.compensation}"
        found = {} if self.compensation == "refit" else dict.fromkeys(("refit_lambda", "refit_tokens"), refit)
        return {**super().idle(), **found}

    @model_validator(mode="after")
    def _refitted(self) -> RefitOptions:
        if self.augment and self.compensation != "refit":
            raise ValueError(f"--augment is for the refit; compensation {self.compensation} has none")
        if self.refit_target == "stream" and self.compensation != "refit":
            raise ValueError(f"--refit-target stream is for the refit; compensation {self.compensation} has none")
        return self


class GroupingOptions(ClusteringOptions, CalibrationOptions):
    """How the tokens of a layer become groups with a router."""

    statistics: Literal["cluster", "routed"] = Field(
        "routed", description="whether an expert's statistics are of its cluster's tokens, or of all tokens that are routed to it"
    )
    routing: Literal["cosine", "euclidean", "hash", "random"] = Field(
        "cosine", description="how a token finds its expert: the nearest mean input by this measure, or without looking at it"
    )


class NeuronOptions(RefitOptions, SelectionOptions, CalibrationOptions):
    """What experts of neurons and static pruning share."""

    @model_validator(mode="after")
    def _made_good(self) -> NeuronOptions:
        if self.neurons == "eliminated" and self.compensation != "refit":
            raise ValueError(f"--neurons eliminated counts on the refit; compensation {self.compensation} has none")
        return self
