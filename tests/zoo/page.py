"""docs/models.md: what the zoo found, a row a model."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Mapping

from tests.zoo.one import REFUSED, WORKS, Outcome
from tests.zoo.table import Entry

PAGE = "docs/models.md"
NOT_RUN = "not run"  # in the page of a run that was ended before
LONG = 260  # characters of a reason

HEAD = """# Models

What `make test-zoo` found, and what it wrote: of every family of timm {timm} the smallest model and its relatives with other
MLPs, attention or positions, made small by the arguments shown, with random weights, through `extract`, `export` and `verify`.

- **works**: the model with every neuron kept gives the dense output; both ONNX graphs give what PyTorch gives (float32, in ONNX
  Runtime on the CPU, batch 1 and 3); `verify` passes. *fp16*: the same export in half precision.
- **refused**: exit code 2 and the sentence shown, within 30 seconds, before any work.
- **not run**: nothing is known of it; `make test-zoo` runs it.

*cut*: MLPs that became experts, of those that were found; the last column says why the others stay dense. {counts}.

What each method can cut, in addition to what the table says:

- `experts`, `moefication`, `clear-moe`, `lowrank`: MLPs of two maps and an activation, those of the column *cut*.
- `static`, `corp`: these, and gated MLPs.
- `heads` (`--attention-macs`), and the heads of `corp`: timm's plain `Attention` (ViT, DeiT, DINOv2). `--corp-attention whole`
  leaves heads alone.
- `tokens` (`--token-macs`): the blocks of timm's `VisionTransformer` with plain attention (ViT, DINOv2 with and without
  registers, DeiT without a distillation token, SigLIP, CLIP, MAE).

What a method cannot cut is refused before any work, with the reason; `moee plan` leaves such a method out where others are tried.

| family | model | size | outcome | cut | fp16 | the rest stays dense because |
|---|---|---|---|---|---|---|
"""


def page(outcomes: Mapping[Entry, Outcome | None]) -> str:
    """The page, in the order of the outcomes; None is a model that was not run."""
    counts = Counter(outcome.kind if outcome else NOT_RUN for outcome in outcomes.values())
    said = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items(), key=lambda item: item[0] != WORKS))
    head = HEAD.format(timm=importlib.metadata.version("timm"), counts=f"{len(outcomes)} models: {said}")
    return head + "".join(f"{row(entry)} {_found(outcome)}\n" for entry, outcome in outcomes.items())


def row(entry: Entry) -> str:
    """The first columns of a model's row, which do not depend on its outcome."""
    size = "its own" if entry.pixels is None else f"{entry.pixels} px"
    arguments = " ".join(f"{name}={value}" for name, value in entry.kwargs.items())
    return f"| {entry.family} | {entry.title} | {size}{f', `{arguments}`' if arguments else ''} |"


def _found(outcome: Outcome | None) -> str:
    if outcome is None:
        return f"{NOT_RUN} | | | |"
    reason = outcome.reason.replace("|", "\\|")
    reason = reason if len(reason) <= LONG else f"{reason[:LONG]}..."
    if outcome.kind == REFUSED:
        return f"refused | | | {reason} |"
    return f"{outcome.kind} | {outcome.cut} of {outcome.candidates} | {outcome.half.replace('|', ' ')} | {reason} |"
