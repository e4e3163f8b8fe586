"""What users choose: the base of all options with the types of their fields, and the options of fine-tuning.

The options of a method stand beside the code that obeys them: `moee.clustering.options`, `moee.calibrate.options`, and each
method's own file in `moee.methods`.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moee.errors import OptionError, UserError
from moee.expected import NUMBERS, expected, plain_type
from moee.schema import shown

PAPER_TOKENS = 126_080  # tokens a layer in the paper's calibration
MOST_COUNT = 2**31 - 1  # what any count may be: more than anyone has of anything, and whole in every library behind
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
MOST_WORKERS = max(64, 4 * CPUS)  # threads or processes of one command: more fill the memory and save no time
MOST_BATCH = 1 << 16  # images of a batch
MOST_EPOCHS = 1_000_000
MOST_FACTOR = 1e6  # a ridge, rate, radius or norm beyond it is a slip
MOST_SEEDS = 1000  # runs of an ablation's cell
MOST_VIEWS = 1000  # of one training image
MAX_SIDE = 4096  # pixels; a batch of images of that size is gigabytes

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy's and scikit-learn's range
Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]
Views = Annotated[int, Field(ge=0, le=MOST_VIEWS)]


class Options(BaseModel):
    """Base of what a user chooses: frozen, checked, no other field than those that it names. A field's description is the text
    of its flag's help, where it has one; it says what the field is for, and the default only where that is worked out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def idle(self) -> dict[str, str]:
        """Names of fields that change nothing beside the values of others, and what each is for."""
        return {}

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_is(cls, value: Any, info: ValidationInfo) -> Any:
        """A number is no text and no truth value, a list no text: none is taken for the other."""
        assert info.field_name is not None, "validators of fields have one"
        kind = plain_type(cls.model_fields[info.field_name].annotation)
        if kind in (int, float) and isinstance(value, (bool, str)):
            raise PydanticCustomError("float_type", "expected a number")
        if get_origin(kind) is tuple and not isinstance(value, (list, tuple)):
            raise ValueError("expected a list")
        return value


class FinetuneConfig(Options):
    """Distillation from the dense model. Defaults are the paper's recipe, but for the learning rate; a last-feature match serves
    backbones."""

    seed: Seed = Field(0, description="seed of the order of the images and of everything that is drawn")
    epochs: int = Field(30, ge=1, le=MOST_EPOCHS, description="passes over the training images")
    batch_size: int = Field(32, ge=1, le=MOST_BATCH, description="images of a step, of all ranks together")
    lr: float | None = Field(
        None, gt=0, le=MOST_FACTOR,
        description="learning rate of AdamW, which falls to zero by a cosine (default: found by a trial; the paper's is "
        "1.5e-5)",
    )  # fmt: skip
    weight_decay: float = Field(0.01, ge=0, le=MOST_FACTOR, description="weight decay of AdamW")
    temperature: float = Field(1.0, gt=0, le=MOST_FACTOR, description="temperature of the logits' KL divergence, of classifiers")
    distil: Literal["output", "tokens"] = Field(
        "output", description="what is matched: the output, as in the paper, or the tokens of the last feature map too"
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps over which the learning rate rises from zero")
    train_router: bool = Field(False, description="train the routers too")
    validation: float = Field(
        0.1, gt=0, lt=1, description="share of the training images that chooses the best epoch; extraction fits none of a tenth"
    )
    accumulate: int = Field(
        1, ge=1, le=MOST_BATCH, description="parts that a batch is computed in, one after another: less memory, the same gradient"
    )
    amp: Literal["off", "bf16", "fp16"] = Field("off", description="half precision for the student's products")
    force_amp: bool = Field(False, description="keep --amp on a CPU without instructions for it, where it is many times slower")
    checkpointing: bool = Field(False, description="compute activations again in the backward pass: less memory, more time")
    augment: Views = Field(0, description="random views of each training image that an epoch has beside it")
    collages: Views = Field(0, description="collages a training image that an epoch has beside it")
    train: Literal["all", "experts"] = Field(
        "all", description="which weights are trained: all, or those of routed layers and narrowed attention alone"
    )
    relative_lr: bool = Field(False, description="take --lr as a share of each tensor's root mean square")
    masked: bool = Field(False, description="faster steps on a CPU while experts have few tokens a batch; the result is the same")
    clip_norm: float = Field(0.0, ge=0, le=MOST_FACTOR, description="largest norm of a step's gradient (default: no limit)")

    @model_validator(mode="after")
    def _forced_something(self) -> FinetuneConfig:
        if self.force_amp and self.amp == "off":
            raise ValueError("--force-amp does nothing without --amp; give that too, or leave it out")
        return self


def validated(kind: type[BaseModel], values: dict[str, Any]) -> Any:
    """Build a pydantic model of `values`. Raises `OptionError`, a `UserError`, with the first of its errors as a sentence."""
    if not isinstance(values, dict):  # values may come from a file
        raise UserError(f"{kind.__name__}: expected an object with fields, came {shown(values)}")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        came = f" (came {shown(first['input'])})" if where else ""
        if first["type"] == "missing":
            raise OptionError(f"--{where.replace('_', '-')} is needed; give it", where) from error
        option = f"--{shown(where, quoted=False).replace('_', '-')}: " if where else ""
        field = kind.model_fields.get(str(first["loc"][0])) if first["loc"] else None
        wanted = expected(field) if field is not None and first["type"] in {*NUMBERS, "literal_error"} else ""
        if isinstance(first["input"], str):  # a text is no share, whatever it says
            wanted = wanted.replace("a share", "a number")
        raise OptionError(f"{option}{wanted or first['msg'].removeprefix('Value error, ')}{came}", where) from error
