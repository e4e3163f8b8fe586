"""A short summary in Markdown, for a CI job's page or a pull request."""

from __future__ import annotations

from exporter.verification.result import VerifyResult
from moee.measure.accuracy import Proportion, drop_in_words
from moee.schema import data_title


def _share(p: Proportion) -> str:
    return f"{p.value:.2%} ({p.low:.2%} to {p.high:.2%})"


def to_markdown(result: VerifyResult) -> str:
    """Verdict, what failed, errors by batch size, accuracy, routes."""
    parity, accuracy = result.parity, result.accuracy
    lines = [f"## moee verify: {'passed' if result else 'FAILED'}", ""]
    lines += [f"{parity.runtime}, {parity.precision}, against torch in float64 with the graph's own weights.", ""]
    deviation = parity.first_deviation
    if deviation:
        lines += [f"First deviation: **{deviation.layer}** ({deviation.where}). {deviation.message}.", ""]
    failed = [case for case in result.cases() if case.failure]
    if failed:
        lines += ["| failed | reason |", "|---|---|"]
        lines += [f"| {c.group}, {c.name} | {c.failure.replace('|', '/')} |" for c in failed if c.failure] + [""]
    lines += ["| batch | largest error | mean | p99 | allowed | torch's own | rms |", "|---|---|---|---|---|---|---|"]
    rows = [("", b) for b in parity.batches] + [("engine, ", b) for b in (result.engine.batches if result.engine else [])]
    lines += [
        f"| {label}{b.batch} | {b.max_abs_error:.2e} | {b.mean_abs_error:.2e} | {b.p99_abs_error:.2e} | {b.tolerance_abs:.2e} "
        f"| {b.torch_max_abs_error:.2e} | {b.output_rms:.3g} |"
        for label, b in rows
    ]
    flips = sum(layer.flips for layer in parity.layers)
    equal, routed = parity.mean_route_agreement, len(parity.route_agreement)
    said = "no layer has more than one expert"
    if equal is not None:
        said = f"{equal:.4%} equal to float64 over {routed} layers, {flips} flips"
    lines += ["", f"Routes: {said}."]
    if parity.only_ties:
        lines[-1] += " They are near ties: with the runtime's experts the float64 run agrees."
    lines += [part for note in parity.notes for part in ("", f"Note: {note}.")]
    if accuracy is None:
        return "\n".join([*lines, "", f"Accuracy: not measured, {result.no_accuracy}.", ""])
    of = f" of {data_title(result.data)}".replace("|", "/") if result.data else ""
    drop, interval = drop_in_words(accuracy.drop_pp, accuracy.drop_interval_pp)
    lines += [
        "",
        f"| on {accuracy.counted}{of} (95 % interval) | dense | MoEE |",
        "|---|---|---|",
        f"| top-1 | {_share(accuracy.dense_top1)} | {_share(accuracy.moee_top1)} |",
    ]
    if accuracy.dense_top5 and accuracy.moee_top5:
        lines.append(f"| top-5 | {_share(accuracy.dense_top5)} | {_share(accuracy.moee_top5)} |")
    gate = "no gate" if accuracy.max_drop_pp is None else f"at most {accuracy.max_drop_pp:g} allowed"
    lines += [
        f"| calibration error | {accuracy.dense_ece:.4f} | {accuracy.moee_ece:.4f} |",
        "",
        f"{drop.capitalize()} ({interval}; {gate}), agreement {_share(accuracy.agreement)}, "
        f"KL {accuracy.kl:.2e} nats.",
        "",
    ]
    return "\n".join(lines)
