"""Which model: everything that loading it needs, and what an artifact records of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SIDE = 4096  # pixels; a batch of images of that size is gigabytes

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class WeightsPart(BaseModel):
    """Which part of a checkpoint is the model's: the container (`state_dict_ema`; "" for the whole file) and the prefix that its
    names have there (`module.`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    container: str = ""
    prefix: str = ""


class InputConfig(BaseModel):
    """How images are prepared for a model whose own files say so; what is None stands in timm's table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[Side, Side, Side] | None = None  # channels, height, width
    mean: Annotated[tuple[Finite, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[Annotated[Finite, Field(gt=0)], ...], Field(min_length=1)] | None = None
    crop_pct: float | None = Field(None, gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "hamming", "box", "random"] | None = None
    fixed_input_size: bool | None = None


class ModelSpec(BaseModel):
    """Which timm model: everything that `load_model` needs, and what an artifact records.

    `input_size` is the height and width of the images for a model that takes any; others take it as the argument `img_size`.
    Its weights come from one place: the file `weights`, timm's `pretrained` ones, or a draw under `random_seed`.
    `weights_sha256` is the hash of the file, or of the state that was fetched or drawn; `part` is the part of the file
    that was taken, so that later commands take the same. `input` is set for models that bring their own configuration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    timm_name: str
    kwargs: dict[str, Any] = {}
    input_size: tuple[Side, Side] | None = None
    pretrained: bool = False
    weights: str | None = None
    weights_sha256: str | None = None
    part: WeightsPart | None = None
    random_seed: int | None = Field(None, ge=0, lt=2**63)
    input: InputConfig | None = None

    @property
    def has_weights(self) -> bool:
        """Whether it says where its weights come from. Artifacts of the first release may not."""
        return self.pretrained or self.weights is not None or self.random_seed is not None

    def identity(self) -> dict[str, Any]:
        """What decides the outputs of the model `name`, for whoever must know whether two runs worked on the same one."""
        decisive: dict[str, Any] = {"kwargs": self.kwargs, "weights_sha256": self.weights_sha256}
        if self.random_seed is not None:
            decisive["random_seed"] = self.random_seed
        if self.part is not None:  # one file may hold several models
            decisive["part"] = self.part.model_dump()
        if self.input_size is not None:
            decisive["input_size"] = list(self.input_size)
        if self.input is not None:
            decisive["input"] = self.input.model_dump(mode="json", exclude_none=True)
        return decisive
