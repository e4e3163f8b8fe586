"""The part of `moee plan` about devices that are not reached from here: candidates go there, their times come back."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.terminal.flags import OK, at_least, model_inputs, session_of
from exporter.terminal.ui import ProgressDisplay, percent
from moee.bounds import CANDIDATES
from moee.errors import UserError
from moee.places.output_folder import OutputFolder, resume_folder
from moee.planning.budget import Budget
from moee.store.result_kinds import EMIT, PLAN_STATE
from plugins.devices import HOW, parse_sm, profile_named


def add_elsewhere(parser: argparse.ArgumentParser) -> None:
    """`--candidates`, `--emit`, `--measured` and `--sm`."""
    most = "models that are built and timed beside dense on a GPU or another device (6)"
    parser.add_argument("--candidates", type=at_least(*CANDIDATES), default=6, metavar="N", help=most)
    elsewhere = parser.add_argument_group("a device that cannot be reached from here (docs/devices.md)")
    folder = "write the candidates and a measure.sh for a device into this folder, and stop until --measured"
    elsewhere.add_argument("--emit", metavar="DIR", help=folder)
    text = "go on from --emit with the times that measure.sh wrote on the device"
    elsewhere.add_argument("--measured", metavar="RESULT.json", help=text)
    elsewhere.add_argument("--sm", metavar="GPU", help=f"the device's GPU, of --emit and ssh: {HOW}")


def result_of(args: argparse.Namespace) -> str | None:
    """The file of times that a line names; `--device RESULT.json` says the same as `--measured RESULT.json`."""
    named: str | None = args.measured
    return args.device if named is None and (args.device or "").endswith(".json") else named


FLAGS = {"attention": "--attention-macs", "tokens": "--token-macs"}  # that are not called as what they say


def emit(args: argparse.Namespace, console: Console, budget: Budget, ways: dict[str, Any]) -> int:
    """Write the candidates for a device, and say how it goes on."""
    from exporter.targets.emit import Order, emitting
    from exporter.timing.device import latency_of
    from moee.planning.emitted import emit_plan

    board = None if args.device is None else profile_named(args.device)  # its roofline helps to choose
    if board is None and args.sm is None:
        raise UserError("--emit has to know the device's GPU: give --sm, such as --sm orin, or --device with a board")
    order = Order(args.batch, args.precision, parse_sm(args.sm) if args.sm is not None else board.sm)  # type: ignore[union-attr]
    output = OutputFolder(args.emit, EMIT, args.force, model_inputs(args), option="--emit")
    with ProgressDisplay() as report:
        session = session_of(args, report, console, "--torch-device")
        ranking = None if board is None else latency_of(board.name, session, args.batch)
        sending = emit_plan(
            session, budget, args.out, lambda chosen: emitting(output, chosen, session, order, report), most=args.candidates,
            ranking=ranking, force=args.force, report=report, **ways,
        )  # fmt: skip
    size = sum(path.stat().st_size for path in output.place.rglob("*") if path.is_file()) / 2**20
    lines = (
        f"dense and {len(sending.candidates)} candidates written to {args.emit} ({size:.0f} MiB); the points are kept in "
        f"{args.out}.resume",
        "copy that folder to the device and run ./measure.sh in it, which writes RESULT.json; then run this command here with "
        "--measured RESULT.json in the place of --emit",
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    return OK


def go_on(args: argparse.Namespace, console: Console, budget: Budget, ways: dict[str, Any]) -> dict[str, Any]:
    """The plan, by the times of a device. They are held against what was emitted before a model is loaded."""
    from exporter.targets.result import read_result, timed
    from moee.planning import emitted

    path = result_of(args)
    assert path is not None
    board = None if args.device in (None, path) else profile_named(args.device).name
    kept, _ = emitted.read_emitted(resume_folder(args.out, PLAN_STATE, model_inputs(args)))
    for flag, asked, had in (("--batch", args.batch, kept.batch), ("--precision", args.precision, kept.precision)):
        if asked != had:
            raise UserError(f"the candidates were written with {flag} {had}, and now it is {asked}; give {flag} {had}")
    typed = {
        "methods": args.methods, "targets": args.targets, "allocations": args.allocations, "attention": args.attention_macs,
        "tokens": args.token_macs,
    }  # fmt: skip
    for name, words in typed.items():
        if words is not None and name in kept.ways and {*kept.ways[name]} != {*ways[name]}:
            flag, had = FLAGS.get(name, f"--{name}"), ",".join(map(str, kept.ways[name]))
            raise UserError(f"the candidates were written with {flag} {had}, and now it is {words}; give {flag} {had}")
    times = timed(read_result(path), kept, path, board)
    with ProgressDisplay() as report:
        session = session_of(args, report, console, "--torch-device")
        return emitted.go_on(session, budget, args.out, times, base=ways["base"], force=args.force, report=report)


def measurement_lines(plan: dict[str, Any]) -> list[str]:
    """What was measured on a device, what failed there, and what remains uncertain, as sentences."""
    measured = plan.get("measurement")
    if measured is None:
        return []
    entries, kinds = measured["candidates"], [f"TensorRT {measured['tensorrt']}"] if measured.get("tensorrt") else []
    modes = [e["power_mode"] for e in measured["environment"] if e.get("power_mode")]
    facts = ", ".join([*kinds, measured["precision"], *([f"power mode {modes[0]}"] if modes else [])])
    where = f"measured on {measured['name']} in batches of {measured['batch']} ({facts})"
    lines = [f"dense and {len(entries)} candidates were {where}"]
    for entry in entries:
        if "failed" in entry:
            lines.append(f"{entry['method']} at {percent(entry['macs'])} of the MACs failed there: {entry['failed']}")
    low, high = (plan["winner"]["latency"] or {}).get("speedup_range", (None, None))
    if low is not None and measured.get("rounds") == 1:
        once = f"one round gave {low:.3f}x, and how far rounds differ is not known"
        lines.append(f"that the winner is faster than dense is not shown: {once}; measure more with --rounds")
    elif low is not None and low <= 1 <= high:
        lines.append(f"that the winner is faster than dense is not shown: its timings reach from {low:.3f}x to {high:.3f}x")
    if measured["roofline"] is not None:
        lines.append(measured["roofline"]["said"])
    return lines
