"""Which model: everything that loading it needs, and what an artifact records of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import nn

from moee.config import MAX_SIDE

LibraryName = Literal["timm", "torchvision", "hf", "python", "module"]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Label = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]  # a class name, fit to be shown
Labels = Annotated[tuple[Label, ...], Field(max_length=1 << 15)]


class WeightsPart(BaseModel):
    """Which part of a checkpoint is the model's: the container (`state_dict_ema`; "" for the whole file) and the prefix that its
    names have there (`module.`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    container: str = ""
    prefix: str = ""


class InputConfig(BaseModel):
    """How images are prepared for a model whose own files say so; what is None stands in timm's table."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input_size: tuple[Side, Side, Side] | None = None  # channels, height, width
    mean: Annotated[tuple[Finite, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[Annotated[Finite, Field(gt=0)], ...], Field(min_length=1)] | None = None
    crop_pct: float | None = Field(None, gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "hamming", "box", "random"] | None = None
    fixed_input_size: bool | None = None


class ModelSpec(BaseModel):
    """Which model of which library: everything that `load_model` needs, and what an artifact records.

    `name` is what the user wrote, `timm_name` what the library calls it: timm's or torchvision's name, a class of transformers,
    a function `package.module:function`, the class of a module that Python gave. `kwargs` are the user's arguments, `config`
    what a folder of transformers says beside them. `input_size` is the height and width of the images for a model that takes
    any; others take it as an argument. Its weights come from one place: the file `weights`, the library's `pretrained` ones (or
    those that the function brings), or a draw under `random_seed`. `weights_sha256` is the hash of the file, or of the state
    that was fetched, brought or drawn; `part` is the part of the file that was taken, so that later commands take the same.
    `input` is set for models that bring their own configuration, `labels` where it names their classes. `outputs`: what a
    function's model gives where the user says it, a number of classes, or 0 for features. """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    timm_name: str
    library: LibraryName = "timm"
    kwargs: dict[str, Any] = {}
    config: dict[str, Any] | None = None
    input_size: tuple[Side, Side] | None = None
    pretrained: bool = False
    weights: str | None = None
    weights_sha256: str | None = None
    part: WeightsPart | None = None
    random_seed: int | None = Field(None, ge=0, lt=2**63)
    input: InputConfig | None = None
    labels: Labels = ()
    outputs: int | None = Field(None, ge=0, le=1 << 20)
    _named_by_user: bool = PrivateAttr(False)  # never read from a file
    _module: nn.Module | None = PrivateAttr(None)

    @property
    def called(self) -> str:
        """What sentences call it."""
        return self.timm_name if self.library == "timm" else self.name

    @property
    def named_by_user(self) -> bool:
        """Whether a person, and no file, named the function of a "python" model, so that it may be imported."""
        return self._named_by_user

    def with_word(self, name: str) -> ModelSpec:
        """The same model by the function that the user names, which may then be imported."""
        word = self.model_copy(update={"name": name, "timm_name": name})
        word._named_by_user = True
        return word

    @property
    def module(self) -> nn.Module | None:
        """The module that a "module" model is, where Python has given it."""
        return self._module

    def with_module(self, module: nn.Module) -> ModelSpec:
        """The same model by the module itself."""
        given = self.model_copy()
        given._module = module
        return given

    @property
    def has_weights(self) -> bool:
        """Whether it says where its weights come from. Artifacts of the first release may not."""
        return self.pretrained or self.weights is not None or self.random_seed is not None

    def identity(self) -> dict[str, Any]:
        """What decides the outputs of the model `name`, for whoever must know whether two runs worked on the same one."""
        decisive: dict[str, Any] = {"kwargs": self.kwargs, "weights_sha256": self.weights_sha256}
        if self.library != "timm":
            decisive |= {"library": self.library, "config": self.config, "outputs": self.outputs}
        if self.random_seed is not None:
            decisive["random_seed"] = self.random_seed
        if self.part is not None:  # one file may hold several models
            decisive["part"] = self.part.model_dump()
        if self.input_size is not None:
            decisive["input_size"] = list(self.input_size)
        if self.input is not None:
            decisive["input"] = self.input.model_dump(mode="json", exclude_none=True)
        return decisive
