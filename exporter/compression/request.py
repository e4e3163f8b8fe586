"""What a user asks of `moee compress`, and what is taken for what was not said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exporter.ship.cpu_bundle import CPU
from exporter.targets.file import ENDING
from exporter.targets.registry import WORDS, target_of
from exporter.terminal.options import flag_of
from moee.errors import UserError
from moee.methods.registry import cutting
from moee.planning.budget import Budget
from moee.planning.search import variants
from moee.stages.session import Session
from plugins.devices import parse_sm

DROP, COSINE = 1.0, 0.98  # of a budget that nobody gave: percentage points of accuracy, or the mean cosine to the dense outputs
TIME_S = 1200.0
MORE_DROP, MORE_DISTANCE = 2.0, 1.25  # points of accuracy, and of one less the cosine, that tuning may bring back
METHODS = ("static", "tokens", "kmeans-4")  # two that need no plugin, and experts, which take longest to prepare
ALLOCATION = ("sensitivity",)  # what serves both best (docs/results/methods.md)
HEADS = (1.0, 0.75)  # shares of the attention's MACs
BASE = {  # of all ways: seconds instead of minutes
    "cluster_tokens": 6000, "tokens": 40_000, "refit_tokens": 40_000, "sensitivity_tokens": 16_384, "attention_probes": 16,
    "attention_tokens": 30_000, "neurons": "eliminated", "refit_target": "stream",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """`device`: where models are timed, as `moee plan --device` takes it. `sm`: the GPU that the bundle is for, None for the
    CPU. `budget`: None for `default_budget`. `time_s`: None for as long as it takes. `methods`, `heads` and
    `tokens`: what is tried. `confirm`: further images, on which the result is measured."""

    budget: Budget | None = None
    device: str = CPU
    sm: int | None = None
    batch: int = 8
    time_s: float | None = TIME_S
    methods: tuple[str, ...] = METHODS
    heads: tuple[float, ...] = HEADS
    tokens: tuple[float, ...] = (1.0,)
    confirm: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What a run must have in common with the one that it goes on from: not the time, nor what is done at the end."""
        return {
            "budget": self.budget.model_dump() if self.budget else None, "device": self.device, "sm": self.sm,
            "batch": self.batch, "methods": list(self.methods), "heads": list(self.heads), "tokens": list(self.tokens),
        }  # fmt: skip


def every_method() -> tuple[str, ...]:
    """Every way that is registered, the usual ones first: the time may not serve for all."""
    return tuple(dict.fromkeys([*METHODS, *variants()]))


def target_sm(device: str, sm: str | None) -> int | None:
    """The SM of the bundle: `sm` as a user names it, else that of the board `device`; None for the CPU. Raises `UserError`."""
    if device.endswith(ENDING):
        raise UserError(f"--device {device}: a file of times is of candidates that moee plan --emit wrote; give it to moee plan")
    if sm is not None:
        return None if sm == CPU else parse_sm(sm)
    if device == CPU:
        return None
    target_of(device)  # knows more words than an SM has names
    if device in WORDS or ":" in device:
        raise UserError(f"--device {device} does not say for which GPU the bundle is; say it with --sm, such as --sm orin")
    return parse_sm(device)


def default_budget(session: Session) -> tuple[Budget, str]:
    """The budget that is taken where nobody gave one, and the sentence that says so."""
    compared = session.early_comparison()
    if compared:
        compared = session.comparison(session.probe())
    if compared:
        taken = Budget(max_drop=DROP)
        return taken, f"no budget was given: at most {DROP:g} point of accuracy may be lost ({flag_of('max_drop')} {DROP:g})"
    return Budget(min_cosine=COSINE), (
        f"no budget was given, and accuracy cannot be compared ({compared.reason}): the outputs must keep a mean "
        f"cosine of {COSINE:g} to the dense ones ({flag_of('min_cosine')} {COSINE:g})"
    )


def widened(budget: Budget) -> Budget | None:
    """The budget for trials whose models are tuned afterwards; None where quality is not limited."""
    if not budget.limits_quality:
        return None
    drop = None if budget.max_drop is None else min(99.0, budget.max_drop + MORE_DROP)
    cosine = None if budget.min_cosine is None else 1 - (1 - budget.min_cosine) * MORE_DISTANCE
    return budget.model_copy(update={"max_drop": drop, "min_cosine": cosine})


def described(budget: Budget) -> str:
    """`at most 1 point of accuracy lost, ...`."""
    parts = []
    if budget.max_drop is not None:
        parts.append(f"at most {budget.max_drop:g} point{'' if budget.max_drop == 1 else 's'} of accuracy lost")
    if budget.min_cosine is not None:
        parts.append(f"a cosine of at least {budget.min_cosine:g}")
    if budget.target_latency_ms is not None:
        parts.append(f"at most {budget.target_latency_ms:g} ms a batch")
    if budget.target_macs is not None:
        parts.append(f"at most {budget.target_macs:.0%} of the MACs")
    if budget.target_params is not None:
        parts.append(f"at most {budget.target_params:.0%} of the parameters")
    return ", ".join(parts)


def possible_heads(session: Session, wanted: tuple[float, ...]) -> tuple[tuple[float, ...], str]:
    """The shares of the attention's MACs, of those `wanted`, that the model can be narrowed to, and why others are left out."""
    (method,) = cutting("attention")
    kept, why = [], ""
    for share in wanted:
        if share != 1:
            try:
                method.check(session.dense, session.transform.shape, method.options.model_validate({"attention_macs": share}))
            except UserError as error:
                why = str(error).partition("; leave ")[0]  # what the user did not give
                continue
        kept.append(share)
    return tuple(kept) or (1.0,), why
