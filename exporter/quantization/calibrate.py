"""Steps of the inputs from calibration images, and which layers lose too much to be quantised.

1. One pass in float32 keeps a histogram of magnitudes of each layer's input.
2. Two ways to set the steps are tried on the whole model, and the one that changes its output less is taken: `largest`, 127
   steps up to the largest magnitude, and `mse`, the step whose rounding and clipping lose least of the histogram in mean
   squares. Which one serves depends on whether a model's outliers carry something: those of DINOv2 do.
3. With all layers quantised, the model's output should keep `MIN_SQNR_DB`. If it does not, each layer is quantised alone and
   the layers that lose most are kept in floating point, one after another, until it does.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from exporter.precision import Quantization
from exporter.quantization.modules import quantizable, quantized
from exporter.quantization.ops import HIGH
from moee.data.image_set import ImageSet, batches
from moee.data.sources import located
from moee.errors import UserError
from moee.interface.watch import watched
from moee.progress import Reporter, silent

CALIBRATION_IMAGES = 128
MIN_SQNR_DB = 20.0  # noise of 1 % of the output's power
JUDGED_IMAGES = 32
BATCH = 16
BINS = 4096
METHODS = ("largest", "mse")
STEPS_AN_OCTAVE, OCTAVES = 8, 6  # ranges tried: from the largest magnitude down to a 64th of it


class Histogram:
    """Counts of magnitudes in `BINS` equal bins from 0 to `top`, which doubles when a larger value comes: two bins become one."""

    def __init__(self) -> None:
        self.top, self.largest, self.counts = 0.0, 0.0, np.zeros(BINS)

    def add(self, values: Tensor) -> None:
        magnitudes = values.detach().abs().flatten().float()
        largest = float(magnitudes.max()) if len(magnitudes) else 0.0
        if not math.isfinite(largest):
            raise UserError("calibration: a layer's input is not finite; check the model and its data")
        self.largest = max(self.largest, largest)
        if self.top == 0.0 and largest > 0.0:
            self.top = 2.0 ** math.ceil(math.log2(largest))
        while largest > self.top:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2)])
            self.top *= 2
        if self.top > 0.0:
            self.counts += torch.histc(magnitudes, BINS, 0.0, self.top).double().numpy()

    def step(self, method: str) -> float:
        """The step of 127 by `largest` or `mse` (see above), `UserError` for another method; 1 if nothing but zeros came."""
        if method not in METHODS:
            raise UserError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
        if not self.counts.any() or self.largest == 0.0:
            return 1.0
        if method == "largest":
            return self.largest / HIGH
        centres = (np.arange(BINS) + 0.5) * self.top / BINS
        tried = self.largest * 2.0 ** (-np.arange(STEPS_AN_OCTAVE * OCTAVES) / STEPS_AN_OCTAVE) / HIGH
        errors = [float((self.counts * (centres - np.clip(np.round(centres / s), 0, HIGH) * s) ** 2).sum()) for s in tried]
        return float(tried[int(np.argmin(errors))])


def sqnr_db(reference: Tensor, noisy: Tensor) -> float:
    """Power of `reference` over the power of its difference to `noisy`, of one shape, in decibels; infinite if there is none,
    minus infinity if one of them holds a value that is no number."""
    power, noise = (float(x.square().sum()) for x in (reference.double(), noisy.double() - reference.double()))
    if not math.isfinite(noise) or power == 0 < noise:
        return -math.inf
    return 10 * math.log10(power / noise) if noise > 0 else math.inf


@torch.inference_mode()
def calibrate(
    model: nn.Module, data: ImageSet, dtype: torch.dtype, images: int = CALIBRATION_IMAGES, report: Reporter = silent,
    *, min_sqnr_db: float = MIN_SQNR_DB,
) -> Quantization:  # fmt: skip
    """Calibrate float32 `model` on `images` images of `data`, drawn once. `dtype` is the type of the scales.

    Raises `UserError` if `images` is not positive, the data hold none that can be read, or the model gives no numbers on them.
    """
    if images < 1:
        raise UserError(f"--calibration-images {images}: expected 1 or more")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:images]
    names = list(quantizable(model))
    why = _not_quantised(model, next(batches(data, 1)).images)
    histograms = _observe(model, data, order, report)
    kept = {name: why[name] for name in names if name in why}
    histograms = {name: histogram for name, histogram in histograms.items() if name not in why}
    seen = torch.cat([b.images for b in batches(data, BATCH, order=order[:JUDGED_IMAGES])])
    exact = model(seen)
    if not exact.isfinite().all():
        raise UserError(f"the model's outputs on {data.name} are not finite, so int8 cannot be judged; check its weights")

    def loss(chosen: dict[str, float]) -> float:
        return sqnr_db(exact, quantized(model, chosen, dtype).float()(seen))

    tried = {method: {n: histograms[n].step(method) for n in names if n in histograms} for method in METHODS}
    reached, method = max((loss(tried[method]), method) for method in METHODS)
    scales = tried[method]
    if reached < min_sqnr_db:
        alone = {}
        for done, (name, scale) in enumerate(scales.items()):
            alone[name] = loss({name: scale})
            report("sensitivity", done + 1, len(scales))
        for name in sorted(alone, key=lambda n: alone[n]):
            if reached >= min_sqnr_db:
                break
            del scales[name]
            kept[name] = f"quantised alone it leaves the output {alone[name]:.1f} dB; it was among the worst"
            reached = loss(scales)
    return Quantization(
        input_scales=scales, kept=kept, method=method, sqnr_db=min(reached, 999.0), images=len(order), data=located(data.name)
    )


def _not_quantised(model: nn.Module, image: Tensor) -> dict[str, str]:
    """Layers that cannot be quantised, and why: some models read a layer's weight and never call it, or feed it a table."""
    two, four = (_rows(model, image.expand(count, -1, -1, -1)) for count in (2, 4))
    why = {n: "its input does not depend on the images" for n in two if four[n] != 2 * two[n]}
    return why | {n: "the model reads its weight and never calls it" for n in quantizable(model) if n not in two}


def _rows(model: nn.Module, images: Tensor) -> dict[str, int]:
    """First dimension of the input of every layer that can be quantised and runs."""
    rows: dict[str, int] = {}
    with watched(model, quantizable(model), lambda name, x: rows.__setitem__(name, x.shape[0])):
        model(images)
    return rows


def _observe(model: nn.Module, data: ImageSet, order: Tensor, report: Reporter) -> dict[str, Histogram]:
    """Histograms of the inputs of the layers that run, by name."""
    histograms: dict[str, Histogram] = {}
    total = -(-len(order) // BATCH)
    with watched(model, quantizable(model), lambda name, x: histograms.setdefault(name, Histogram()).add(x)):
        for done, batch in enumerate(batches(data, BATCH, order=order), 1):
            model(batch.images)
            report("calibrate int8", done, total)
    return histograms
