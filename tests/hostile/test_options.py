"""Every option of every command at its bounds, past them, of the wrong type, and against others."""

from __future__ import annotations

import argparse
import math
import random
import re
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import exporter.compression.job  # noqa: F401 - what commands load is loaded once
import exporter.timing.dispatch_bench  # noqa: F401
import exporter.verification  # noqa: F401
import moee.ablation.run  # noqa: F401
from moee.expected import limits, plain_type
from tests.hostile.lines import COMMANDS, base, check, field_of, options, run, stopped
from tests.reliability.tiny_vit import NAME

UNFIT = ["", " ", "a\nb", "\x1b]0;x\x07", "x" * 5000, "\udcff"]  # no option takes one
TEXTS = [*UNFIT, "[red]", "[/x]", "[link=file:/x]y", "..", "-", "%s", "{0}", "ß\u3000é"]
NO_NUMBERS = ["x", "1.5.", "0x10", "True", "None", "[1]", "9" * 5000, "9" * 30, "nan", "-inf", "²", ""]  # nor of numbers
WORDS = [*NO_NUMBERS, "1e400", "-0", "1e-400"]
NETWORK = ("ssh:", "hf-hub:")  # values that would open a connection
CASES = [(command, option) for command in COMMANDS for option in options(command)]


def at_bounds(field) -> list[tuple[str, bool]]:
    """Numbers at a field's bounds and next to them, and whether each is past one."""
    whole, bounds, found = plain_type(field.annotation) is int, limits(field), []
    for bound in bounds.values():
        near = [bound - 1, bound, bound + 1] if whole else [math.nextafter(bound, -math.inf),
            bound, math.nextafter(bound, math.inf)]
        found += [(repr(int(value)) if whole else repr(float(value)), past(value, bounds)) for value in near]
    return found


def past(value: float, bounds: dict[str, float]) -> bool:
    """Whether a number is not within bounds."""
    low = value < bounds.get("ge", -math.inf) or value <= bounds.get("gt", -math.inf)
    return low or value > bounds.get("le", math.inf) or value >= bounds.get("lt", math.inf)


def values_of(command: str, option: str) -> list[tuple[str, bool]]:
    """What is tried of an option, its bounds first, and whether it must be refused whatever else the line says."""
    action, field = options(command)[option], field_of(command, option)
    if isinstance(action, argparse._StoreTrueAction | argparse.BooleanOptionalAction):
        return [("=1", True)]
    kind = plain_type(field.annotation) if field is not None else None
    if kind in (int, float) or action.type is not None:
        numbers = at_bounds(field) if field is not None else []
        read = kind in (int, float) or not isinstance(_read(action, "x"), str)
        return [*numbers, *((word, read and word in NO_NUMBERS) for word in WORDS)]
    if get_origin(kind) is Literal:
        first = str(get_args(kind)[0])
        return [(first, False), *((word, True) for word in (first.upper(), f"{first} ", *TEXTS))]
    return [(text, text in UNFIT) for text in TEXTS]


def _read(action: argparse.Action, text: str):
    """What an option's type makes of a text, or None."""
    try:
        found = action.type(text)
    except argparse.ArgumentTypeError:
        return None
    return found[0] if isinstance(found, tuple) else found


def line(command: str, option: str, value: str) -> list[str]:
    return [*base(command, [option]), option + value if value == "=1" else f"{option}={value}"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what lines name; `artifact` is where the work begins to read."""
    for name in ("artifact", "images"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "option"), CASES, ids=[" ".join(case) for case in CASES])
def test_every_option_is_taken_or_refused_by_its_name(command, option, place, capsys, tried):
    with stopped():
        for value, unfit in values_of(command, option):
            words = line(command, option, value)
            outcome = run(words, capsys)
            assert outcome.code == 2 or not unfit, (outcome, value[:60])
            check(outcome, words, place, {"artifact", "images"}, option)
            tried("options", f"{command} {option}", outcome.name)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_shortest_line_begins_to_work(command, place, capsys):
    """Else the lines above would be refused for another reason than their option."""
    with stopped():
        outcome = run(base(command), capsys)
    assert outcome.code in (None, 0), outcome


CONFLICTS = [
    ["extract", "--plan=p", "--recipe=r"], ["extract", "--plan=p", "--keep=0.5"], ["extract", "--method=static", "--clusters=4"],
    ["extract", "--clustering=hdbscan", "--clusters=4"], ["extract", "--clustering=kmeans", "--eps=1"],
    ["extract", "--allocation=model", "--criterion=variance"], ["extract", "--mlp-floor=0.5", "--keep=0.9"],
    ["extract", "--mac-time=a=1", "--allocation=expert"], ["extract", "--mac-time=a=nan"],
    ["extract", "--augment=2", "--compensation=none"],
    ["extract", "--neurons=eliminated", "--compensation=none"], ["extract", "--preset=static", "--method=clear-moe"],
    ["extract", "--method=heads"], ["extract", "--method=moefication", "--top-k=9", "--experts=4"],
    ["extract", "--pretrained", "--random-weights=0"], ["extract", "--checkpoint=w.safetensors", "--random-weights=0"],
    ["verify", "--quick", "--max-drop=1"],
    ["finetune", "--recipe=r", "--epochs=3"], ["export", "--calibration-images=4"], ["export", "--precision=int4"],
    ["bundle", "--sm=87,90"], ["bundle", "--sm=12345"], ["compress", "--target-macs=0.5"],
    ["compress", "--time=1s"], ["compress", "--time=nan"], ["plan", "--emit=e", "--measured=m"], ["plan", "--methods=none"],
    ["plan", "--targets=0.5,1.5"], ["plan", "--device=nothing"], ["bench-dispatch", "--rank=400"],
    ["ablate", "--tables=99"], ["ablate", "--keep=0.5,90"], ["ablate", "--keep=nan"], ["ablate-clear", "--routers=none"],
    ["ablate-clear", "--design=none"], ["inspect", "--random-weights=0"], ["inspect", "--model=a.b:c"],
    ["inspect", "--img-size=33"],
    ["inspect", "--in-chans=4096", "--model-kwargs", "depth=99999999999"], ["inspect", "--model-kwargs", "img_size=nan"],
    ["inspect", "--model-kwargs", "depth"], ["inspect", "--model-kwargs", f"depth={'[' * 500}"],
    ["inspect", "--model-kwargs", "checkpoint_path=/etc/passwd"], ["inspect", "--model-kwargs", "embed_dim=0"],
    ["inspect", "--model-kwargs", "num_heads=3"], ["inspect", "--num-classes=1048577"], ["demo", "--data=elsewhere"],
]  # fmt: skip


@pytest.mark.parametrize("words", CONFLICTS, ids=" ".join)
def test_options_that_do_not_go_together_are_refused(words, place, capsys, tried):
    command, *given = words
    names = [word.partition("=")[0] for word in given if word.startswith("--")]
    with stopped():
        outcome = run([*base(command, names), *given], capsys)
    check(outcome, words, place, {"artifact", "images"})
    assert outcome.code == 2 and not re.search("cannot be read|is not a folder|not found", outcome.text), outcome
    tried("options against each other", " ".join(words)[:60], outcome.name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", COMMANDS)
def test_lines_of_several_options_and_any_values(command, place, capsys, tried):
    named = options(command)
    values = st.one_of(
        st.sampled_from([*TEXTS, *WORDS, NAME]), st.integers().map(str), st.floats().map(repr),
        st.text(max_size=12).filter(lambda text: not text.startswith(NETWORK)),
    )  # fmt: skip

    @settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(sorted(named)), values, min_size=1, max_size=4), st.integers(0, 2**32))
    def lines(chosen, seed):
        source, words = random.Random(seed), []
        for option, value in chosen.items():
            fitting = [each for each, _ in values_of(command, option)] if source.random() < 0.7 else [value]
            value = source.choice(fitting)
            words += [option] if value == "=1" else [f"{option}={value}"]
        whole = [*base(command, list(chosen)), *words]
        outcome = run(whole, capsys)
        check(outcome, whole, place, {"artifact", "images"})
        tried("options at random", command, outcome.name)

    if named:
        with stopped():
            lines()
