"""Commands side by side, and interrupted: the same bytes as alone and undisturbed."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from tests.reliability.commands import COMMANDS, copy, prepare
from tests.reliability.conftest import place, tracing_zygote  # noqa: F401 - fixtures
from tests.reliability.runner import digest, tree
from tests.reliability.test_kill import difference, under

INTERRUPTED = 130  # exit code
EIGHT = ("extract", "extract clear-moe", "finetune", "export", "verify", "plan", "report", "plots")
POINTS = {"extract": 8, "extract clear-moe": 4, "finetune": 8, "plan": 5, "ablate-clear": 4, "export": 3, "verify": 3,
    "plots": 3, "report": 3}  # fmt: skip


def elsewhere(name: str) -> list[str]:
    """A command's line with an output of its own."""
    *words, out = COMMANDS[name].argv
    assert words[-1] == "--out"
    return [*words, f"new-{out}"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_commands_at_once_make_what_each_makes_alone(tracing_zygote, place, tried):  # noqa: F811
    start = prepare(tracing_zygote, place, COMMANDS["verify"])
    lines, made = [elsewhere(name) for name in EIGHT], []
    for at_once in (False, True):
        run = copy(start, place / "point")  # in one place, whose path artifacts name
        done = tracing_zygote.run_together(lines, run) if at_once else [
            (each.code, each.text) for each in (tracing_zygote.run(line, run) for line in lines)
        ]  # fmt: skip
        for code, text in done:
            assert code == 0 and "Traceback" not in text, text
        made.append({path: value for path, value in tree(run).items() if not path.startswith("cache/")})
    theirs, ours = made
    assert ours == theirs, difference(ours, theirs)
    assert all(any(path.startswith(f"new-{COMMANDS[name].out}") for path in ours) for name in EIGHT)
    tried("side by side", "eight commands at once", "the bytes of one after another", len(EIGHT))


def unmeasured(work, out: str) -> bool:
    """Whether a whole model lies there whose measuring was interrupted."""
    path = work / out / "moee.json"
    return path.is_file() and any("unmeasured" in stage for stage in json.loads(path.read_text())["info"]["stages"].values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", POINTS)
def test_a_command_interrupted_at_any_moment_goes_on(name, tracing_zygote, place, tried):  # noqa: F811
    """Ctrl-C: exit code 130 in one sentence, the former result or the new one, whole; the same line then makes what an
    undisturbed run makes."""
    command = COMMANDS[name]
    run, kept = prepare(tracing_zygote, place, command), place / "kept"
    shutil.copytree(run, kept, symlinks=True)
    earlier = under(tree(run), command.out)
    whole = tracing_zygote.run(command.forced(), run)
    assert whole.code == 0, whole.text
    reference, draw = tree(run), random.Random(name)
    for _ in range(POINTS[name]):
        moment = draw.uniform(0.02, 1.0) * whole.seconds
        shutil.rmtree(run)  # and back at its place, since manifests name it and hold hashes of each other
        shutil.copytree(kept, run, symlinks=True)
        inputs = {p: v for p, v in tree(run, raw=True).items() if p.split("/")[0] not in (command.out, "cache", "tmp")}
        outcome = tracing_zygote.run(command.forced(), run, interrupt_after=moment)
        said = (name, moment, outcome)
        assert outcome.code in (INTERRUPTED, 0) and "Traceback" not in outcome.text and not outcome.orphans, said
        assert "unexpected" not in outcome.text, said
        raw, output = tree(run, raw=True), under(tree(run), command.out)
        assert {p: raw.get(p) for p in inputs} == inputs, said
        parts = {p: v for p, v in output.items() if not p.endswith("/") and "/." not in p and p in reference}
        assert (
            output in (earlier, under(reference, command.out)) or unmeasured(run, command.out)
            or (command.resumes and {p: reference[p] for p in parts} == parts)
        ), said  # fmt: skip
        again = tracing_zygote.run(command.forced(), run)
        assert again.code == 0, again
        final = tree(run)
        assert final == reference, (said, difference(final, reference))
        tried("interrupts", name, "resumed" if outcome.code else "done")
    assert digest(kept / "w.safetensors", kept) == digest(run / "w.safetensors", run)
