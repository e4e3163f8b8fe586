"""Configuration of extraction and fine-tuning: frozen, validated, JSON round trip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moee.errors import UserError
from moee.schema import shown

PARTITIONS = ("kmeans", "birch", "random")  # clusterings that are told how many clusters to make
PAPER_TOKENS = 126_080  # tokens a layer in the paper's calibration
MOST_COUNT = 2**31 - 1  # what any count may be: more than anyone has of anything, and whole in every library behind
MOST_WORKERS = 4096  # threads or processes of one command
MOST_BATCH = 1 << 16  # images of a batch
MOST_EPOCHS = 1_000_000
MOST_FACTOR = 1e6  # a ridge, rate, radius or norm beyond it is a slip
MOST_SEEDS = 1000  # runs of an ablation's cell
MOST_VIEWS = 1000  # of one training image

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy's and scikit-learn's range
Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]
Views = Annotated[int, Field(ge=0, le=MOST_VIEWS)]


class MethodOptions(BaseModel):
    """What every method's options have: how much of the attention stays. `moee.methods.registry` knows whose options they are."""

    model_config = ConfigDict(allow_inf_nan=False)

    if TYPE_CHECKING:  # fields of every method's options, each in its own place among them
        seed: int
        exclude: tuple[str, ...]

        @property
        def method(self) -> str: ...

    attention_macs: float | None = Field(None, gt=0, le=1, description="share of the attention's MACs that stays; None: all")
    attention_heads: Literal["separate", "equal"] = Field(
        "separate", description="whether a layer's queries and keys may have another width than its values"
    )

    @model_validator(mode="after")
    def _attention(self) -> MethodOptions:
        if self.attention_macs is None and self.attention_heads != "separate":
            raise ValueError("--attention-heads says how --attention-macs is met; give that too")
        return self

    @property
    def narrows(self) -> tuple[float, bool] | None:
        """Share of the attention's MACs and whether widths are to be equal; None if attention stays as it is."""
        return None if self.attention_macs in (None, 1) else (self.attention_macs, self.attention_heads == "equal")

    @property
    def cuts_gated(self) -> bool:
        """Whether the method cuts gated MLPs."""
        return False

    @property
    def mlp_budget(self) -> float | None:
        """Share of the model's MACs that cutting the MLPs alone must reach; None where nothing of the kind is asked."""
        return None

    @property
    def seen_collages(self) -> int:
        """Collages a training image that calibration sees beside it."""
        return 0


class ExtractConfig(MethodOptions):
    """How experts are found. Defaults are the preset `compensated`.

    `keep` is the share of the criterion (a weighted activation variance) that the kept neurons must hold: in each expert
    with `allocation` expert, over all layers and experts together with `allocation` model. `target_macs` finds the share that
    meets a cost instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["moee", "moefication"] = "moee"
    seed: Seed = 0
    tokens: Count = Field(PAPER_TOKENS, description="calibration tokens a layer")
    exclude: tuple[str, ...] = ()
    clustering: Literal["hdbscan", "dbscan", "optics", "kmeans", "birch", "random", "none"] = "hdbscan"
    components: Count | None = Field(None, description="principal components before clustering; None clusters all features")
    cluster_tokens: int = Field(
        PAPER_TOKENS, ge=2, le=MOST_COUNT, description="tokens a layer that are clustered; the rest feeds statistics"
    )
    min_cluster_size: float = Field(0.006, gt=0, lt=1, description="share of the clustered tokens")
    min_samples: Count | None = None
    clusters: int | None = Field(None, ge=2, le=MOST_COUNT, description="of a partition method; None takes HDBSCAN's number")
    eps: float | None = Field(None, gt=0, le=MOST_FACTOR, description="DBSCAN's radius; None takes the median core distance")
    criterion: Literal["sensitivity", "output_variance", "variance", "magnitude", "random"] = "output_variance"
    keep: float = Field(0.95, gt=0, le=1)
    allocation: Literal["expert", "model"] = "expert"
    target_macs: float | None = Field(None, gt=0, lt=1, description="MACs of the result as a share of the dense model's")
    objective: Literal["output", "tokens", "both"] = "both"
    sensitivity_tokens: Count = Field(32_768, description="tokens a layer that the sensitivity is measured on")
    statistics: Literal["cluster", "routed"] = "routed"
    compensation: Literal["none", "mean", "refit"] = "refit"
    routing: Literal["cosine", "euclidean", "hash", "random"] = "cosine"
    experts: Count | None = Field(None, description="of MoEfication: equal shares of the neurons")
    top_k: Count = Field(1, description="experts a token, MoEfication only")
    split: Literal["weights", "coactivation"] = "weights"
    selector: Literal["centre", "router"] = "centre"
    refit_lambda: float | None = Field(
        None, gt=0, le=MOST_FACTOR, description="of the Gram matrix's mean diagonal; None: by held-out images"
    )
    refit_tokens: Count = Field(PAPER_TOKENS, description="tokens a layer that the refit may use")
    augment: Views = Field(0, description="random views of each training image that the refit sees beside it")
    collages: Views = Field(0, description="collages a training image that calibration and refit see beside it")

    @property
    def static(self) -> bool:
        """Whether every token keeps the same neurons: static pruning, which takes gated MLPs too."""
        return self.method == "moee" and self.clustering == "none"

    @property
    def cuts_gated(self) -> bool:
        return self.static

    @property
    def mlp_budget(self) -> float | None:
        return None if self.narrows is not None else self.target_macs

    @property
    def seen_collages(self) -> int:
        return self.collages

    @model_validator(mode="after")
    def _consistent(self) -> ExtractConfig:
        if self.method == "moefication":
            if self.experts is None or self.top_k > self.experts:
                raise ValueError(f"method moefication needs --experts, and --top-k (now {self.top_k}) within it")
            if self.compensation == "refit":
                raise ValueError("compensation refit is for method moee; moefication takes none or mean")
        elif self.experts is not None or self.top_k != 1:
            raise ValueError("--experts and --top-k are for --method moefication; MoEE finds its experts by --clustering")
        if self.target_macs is not None and self.method == "moefication":
            raise ValueError("--target-macs is for method moee; moefication's cost is --top-k of --experts")
        if self.allocation == "model" and self.criterion != "sensitivity":
            raise ValueError(
                f"--allocation model compares neurons across layers, so it needs --criterion sensitivity (came {self.criterion})"
            )
        if self.criterion == "sensitivity" and self.statistics == "cluster":
            raise ValueError("--criterion sensitivity is measured on routed tokens; use --statistics routed")
        if self.clustering not in PARTITIONS and self.clusters is not None:
            raise ValueError(
                f"--clusters is for {', '.join(PARTITIONS)}; clustering {self.clustering} chooses their number itself"
            )
        if self.augment and self.compensation != "refit":
            raise ValueError(f"--augment is for the refit; compensation {self.compensation} has none")
        if self.clustering != "dbscan" and self.eps is not None:
            raise ValueError(f"--eps is for dbscan; clustering {self.clustering} has no radius")
        return self


class FinetuneConfig(BaseModel):
    """Distillation from the dense model. Defaults are the paper's recipe; a last-feature match serves backbones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: Seed = 0
    epochs: int = Field(30, ge=1, le=MOST_EPOCHS)
    batch_size: int = Field(32, ge=1, le=MOST_BATCH)
    lr: float = Field(1.5e-5, gt=0, le=MOST_FACTOR)
    weight_decay: float = Field(0.01, ge=0, le=MOST_FACTOR)
    temperature: float = Field(1.0, gt=0, le=MOST_FACTOR, description="of the logits KL, classifiers only")
    distil: Literal["output", "tokens"] = "output"
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps over which the learning rate rises from zero")
    train_router: bool = False
    validation: float = Field(0.1, gt=0, lt=1, description="share of the images that chooses the best epoch")
    accumulate: int = Field(
        1, ge=1, le=MOST_BATCH, description="parts that a rank computes its share of a batch in, one after another"
    )
    amp: Literal["off", "bf16", "fp16"] = "off"
    force_amp: bool = Field(False, description="keep amp on a CPU without instructions for it, where it is many times slower")
    checkpointing: bool = False
    augment: Views = Field(0, description="random views of each training image that an epoch has beside it")
    collages: Views = Field(0, description="collages a training image that an epoch has beside it")
    train: Literal["all", "experts"] = Field("all", description="all weights, or those of routed layers and narrowed attention")
    relative_lr: bool = Field(False, description="lr is a share of each tensor's root mean square instead of an absolute step")
    masked: bool = Field(False, description="compute every stored neuron under a mask while experts have few tokens of a batch")
    clip_norm: float = Field(0.0, ge=0, le=MOST_FACTOR, description="largest norm of a step's gradient; 0: as it is")


PRESETS: dict[str, dict[str, Any]] = {
    "compensated": {},
    "paper": {"criterion": "variance", "keep": 0.80, "statistics": "cluster", "compensation": "none"},
    "static": {"clustering": "none"},
    "moefication": {"method": "moefication", "compensation": "mean"},
}


DEFAULT_PRESET = "compensated"


def make_extract_config(preset: str = DEFAULT_PRESET, **overrides: Any) -> ExtractConfig:
    """A preset with overrides. Raises `UserError` for an unknown preset or a value that does not fit."""
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}")
    return validated(ExtractConfig, {**PRESETS[preset], **{k: v for k, v in overrides.items() if v is not None}})


def validated(kind: type, values: dict[str, Any]) -> Any:
    """Build a pydantic model; its errors become one `UserError` sentence."""
    if not isinstance(values, dict):  # values may come from a file
        raise UserError(f"{kind.__name__}: expected an object with fields, came {shown(values)}")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        came = f" (came {shown(first['input'])})" if where else ""
        option = f"--{shown(where, quoted=False).replace('_', '-')}: " if where else ""
        raise UserError(f"{option}{first['msg'].removeprefix('Value error, ')}{came}") from error
