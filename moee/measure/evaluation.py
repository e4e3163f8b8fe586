"""Run a model over held-out images, and say how much of the dense model a changed one retains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moee.data.image_set import ImageSet, batches, merge_skipped
from moee.interface.adapted import run_model, title_of_model
from moee.interface.watch import watched
from moee.layers.routed import routed_layers
from moee.measure.accuracy import Comparison, Interval, paired_drop, shared_answers, top1, wilson
from moee.measure.metrics import mean_cosine
from moee.measure.probe import Probe
from moee.models.ffn import channels_last
from moee.parallel.group import SOLO, Group, Parcel
from moee.parallel.machine import in_half
from moee.progress import Reporter, silent, track
from moee.space.limits import FORWARD

MAX_TOKEN_BYTES = 1 << 30  # above this the token features of a data set are not kept


@dataclass(frozen=True)
class Outputs:
    """`features` [N, C] (logits of a classifier), `tokens` [N, ..., D] float16 or None (`no_tokens` says why), `labels` [N] (-1:
    none), `shares`: per routed layer, each expert's share of the tokens."""

    features: Tensor
    tokens: Tensor | None
    labels: Tensor
    shares: dict[str, list[float]] = field(default_factory=dict)
    no_tokens: str = ""


@dataclass(frozen=True, repr=False)
class Retention:
    """A changed model against the dense one on the same `images`.

    Accuracies are of the `labelled` ones, with 95 % intervals; None where they cannot be compared, and `no_accuracy` says why.
    `drop_interval_pp`: 95 % of the drop in percentage points, of paired proportions. The agreement is of all images, None
    without classes."""

    images: int
    top1_agreement: float | None
    class_cosine: float
    token_cosine: float | None
    labelled: int
    no_accuracy: str
    dense_accuracy: float | None = None
    accuracy: float | None = None
    dense_accuracy_interval: Interval | None = None
    accuracy_interval: Interval | None = None
    drop_interval_pp: Interval | None = None
    no_tokens: str = ""  # why there is no token cosine
    probe: bool = False  # whether accuracies and agreement are those of a probe on the features

    def __repr__(self) -> str:
        """One line, as a notebook shows it."""
        said = [f"{self.images} images"]
        if self.accuracy is not None and self.dense_accuracy is not None:
            within = "95 % interval {:.1%} to {:.1%}, ".format(*self.accuracy_interval) if self.accuracy_interval else ""
            beside = f"({within}dense {self.dense_accuracy:.2%}, {self.labelled} labelled)"
            said.append(f"accuracy{' of a probe' if self.probe else ''} {self.accuracy:.2%} {beside}")
        else:
            said.append(f"accuracy not compared ({self.no_accuracy})")
        if self.top1_agreement is not None:
            said.append(f"same class {self.top1_agreement:.2%}")
        said.append(f"class cosine {self.class_cosine:.4f}")
        tokens = f"no token cosine ({self.no_tokens})" if self.token_cosine is None else f"token cosine {self.token_cosine:.4f}"
        return f"Retention({', '.join([*said, tokens])})"

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@torch.inference_mode()
def run(
    model: nn.Module, data: ImageSet, report: Reporter = silent, message: str = "evaluate", batch_size: int = FORWARD,
    *, group: Group = SOLO,
) -> Outputs:  # fmt: skip
    """Outputs, last token features and routing shares of `model` on `data`, in one pass.

    In a `group` each rank runs its share of the batches; `features`, `labels` and `shares` are whole on every rank, `tokens` on
    rank 0 alone (None on the others).
    """
    layers = routed_layers(model)
    counts = {name: torch.zeros(layer.num_experts, dtype=torch.int64) for name, layer in layers.items()}

    def count(name: str, x: Tensor) -> None:
        layer = layers[name]
        counts[name] += torch.bincount(layer.routes(x).flatten(), minlength=layer.num_experts).cpu()

    features, tokens, labels = [], [], []
    no_tokens = ""
    part = group.part(len(data), batch_size)
    with watched(model, layers, count), group.agreed(), group.placed(model):
        shared = batches(data, batch_size, order=torch.arange(part.start, part.stop), strict=group.alone)
        for batch in track(shared, message, -(-len(part) // batch_size), report):
            output, last = run_model(model, batch.images.to(group.device))
            features.append(output.cpu())
            labels.append(batch.labels)
            no_tokens = no_tokens or _no_token_map(last, model, len(data))
            if not no_tokens:
                tokens.append(in_half(channels_last(last, model)).cpu())
    if not group.alone:
        merge_skipped(data, group)
    answers = {"features": torch.cat(features), "labels": torch.cat(labels)} if features else {}
    keep = not no_tokens
    if not group.alone:
        answers, tokens, keep = _merged(answers, tokens, keep, group)
        for name in counts:
            group.sum(counts[name])
    shares = {name: (c.double() / c.sum()).tolist() for name, c in counts.items()}
    return Outputs(answers["features"], torch.cat(tokens) if keep else None, answers["labels"], shares, no_tokens)


def _no_token_map(features: Any, model: nn.Module, images: int) -> str:
    """Why features [B, ..., D] or [B, D, ...] cannot be compared token by token over all `images`; empty if they can."""
    title = title_of_model(model)
    if not isinstance(features, Tensor):
        return f"{title} has no single feature map"
    if features.dim() < 3:
        return f"{title} has one feature vector an image"
    width = getattr(model, "num_features", 0)
    if width not in (features.shape[1], features.shape[-1]):
        return f"{title}'s feature map has no dimension of {width}"
    if features[0].numel() * 2 * images > MAX_TOKEN_BYTES:
        return f"the token features of {images} images take more than {MAX_TOKEN_BYTES >> 30} GiB"
    return ""


def _merged(
    answers: dict[str, Tensor], tokens: list[Tensor], keep: bool, group: Group
) -> tuple[dict[str, Tensor], list[Tensor], bool]:
    """The ranks' parts in rank order, which is the order of the images: features and labels everywhere, tokens on rank 0."""
    own = {**answers, "tokens": torch.cat(tokens)} if keep and answers else answers
    parts = [p for p in group.gather(Parcel(None, own)) if p.tensors]
    whole = {name: torch.cat([p.tensors[name] for p in parts]) for name in ("features", "labels")} if parts else {}
    keep = bool(parts) and all("tokens" in p.tensors for p in parts)
    merged = group.broadcast(Parcel(None, whole) if group.leader else None).tensors
    return dict(merged), [p.tensors["tokens"] for p in parts] if keep else [], keep


def retention(reference: Outputs, outputs: Outputs, probe: Probe | None, told: int, compared: Comparison) -> Retention:
    """Compare `outputs` with the dense `reference` on the same images; `probe` gives logits where there is no classifier.

    `told`: how many classes the logits are of, 0 for none. `compared`: whether the dense model's accuracy means something.
    """
    dense_logits, logits = reference.features, outputs.features
    if probe is not None:
        dense_logits, logits = probe.logits(dense_logits), probe.logits(logits)
    accuracies: dict[str, Any] = {}
    if compared and compared.dense is not None:
        labelled = reference.labels >= 0
        hits = [(top1(part) == reference.labels)[labelled].numpy() for part in (dense_logits, logits)]
        ours = wilson(int(hits[1].sum()), len(hits[1]))
        accuracies = {
            "dense_accuracy": compared.dense.value, "dense_accuracy_interval": compared.dense.interval,
            "accuracy": ours.value, "accuracy_interval": ours.interval, "drop_interval_pp": paired_drop(hits[0], hits[1])[1],
        }  # fmt: skip
    token_cosine = None
    if reference.tokens is not None and outputs.tokens is not None:
        token_cosine = mean_cosine(reference.tokens.flatten(0, -2), outputs.tokens.flatten(0, -2))
    return Retention(
        images=len(reference.labels),
        top1_agreement=shared_answers(dense_logits, logits) if told > 1 else None,
        class_cosine=mean_cosine(reference.features, outputs.features),
        token_cosine=token_cosine,
        no_tokens="" if token_cosine is not None else reference.no_tokens or outputs.no_tokens,
        labelled=compared.labelled,
        probe=probe is not None,
        no_accuracy=compared.reason,
        **accuracies,
    )
