"""Numbers on the command line: every option that takes one says which it takes, before anything is read."""

import argparse
import json
import math

import pytest
from pydantic import BaseModel

import exporter.quantization  # noqa: F401 - its models are walked too
import moee.ablation  # noqa: F401
import moee.planning  # noqa: F401
import moee.train.scratch  # noqa: F401
from exporter import cli
from exporter.timing.profile import _batch
from moee.errors import UserError
from moee.schema import Body, json_text

HUGE = "1" + "0" * 20
TRIED = ("nan", "inf", "-1", "0", HUGE)
INPUTS = {"--data": "no/data", "--model": "no-such-model", "--sm": "87"}  # of options that a command cannot be without
LISTS = {"--targets", "--attention-macs", "--keep"}  # read as text
# Zero where it means none, any, or a seed. Everything else that was tried is refused by name.
ZERO = {
    "--atol": "verify", "--augment": "extract finetune", "--clip-norm": "finetune",
    "--collages": "extract finetune plan", "--duration": "bench", "--images": "verify", "--max-drop": "plan verify compress",
    "--min-route-agreement": "verify", "--num-classes": "plan extract inspect ablate ablate-clear compress",
    "--random-weights": "plan extract ablate ablate-clear compress", "--residual-rank": "extract ablate-clear",
    "--rtol": "verify", "--tolerance": "shrink", "--seed": "plan extract finetune shrink",
    "--throughput": "bench", "--warmup": "finetune",
    "--weight-decay": "finetune", "--workers": "extract finetune verify",
}  # fmt: skip
BESIDE = {  # what an option cannot be without, or must not stand beside
    ("shrink", "--tolerance"): ["--specialise"], ("shrink", "--seed"): ["--experts", "4"],
    ("extract", "--rank"): ["--method", "clear-moe", "--residual-rank", "0"],
    ("extract", "--residual-rank"): ["--method", "clear-moe", "--rank", "8"],
    ("extract", "--energy"): ["--method", "clear-moe"], ("extract", "--layers"): ["--method", "clear-moe"],
    ("extract", "--calibration-images"): ["--method", "clear-moe"],
    ("extract", "--experts"): ["--preset", "moefication"], ("extract", "--top-k"): ["--preset", "moefication", "--experts", "4"],
    ("extract", "--eps"): ["--clustering", "dbscan"], ("export", "--calibration-images"): ["--precision", "int8"],
}  # fmt: skip


PARSER = cli.build_parser()


def options():
    """Every (command, option, its parser) of the command line whose values are numbers."""
    todo = [((), PARSER)]
    while todo:
        command, parser = todo.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                todo += [((*command, name), sub) for name, sub in action.choices.items()]
            elif action.option_strings and (_counts(action) or set(action.option_strings) & LISTS):
                yield " ".join(command), next(o for o in action.option_strings if o.startswith("--")), parser


def _counts(action):
    """Whether an option's type reads numbers."""
    if action.type is None:
        return False
    try:
        return isinstance(action.type("1"), (int, float)) or isinstance(action.type("1")[0], (int, float))
    except Exception:
        return True


CASES = [(command, option) for command, option, _ in options()]


def test_the_options_are_found():
    assert len(CASES) > 90
    assert {option for _, option in CASES} >= {"--runs", "--seed", "--ranks", "--targets", "--img-size", "--rank-timeout"}
    assert not set(ZERO) - {option for _, option in CASES}


@pytest.mark.parametrize(("command", "option"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_number_is_taken_on_purpose_or_refused_by_name_before_anything_is_read(command, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "build_parser", lambda shown=None: PARSER)
    parser = next(p for c, o, p in options() if (c, o) == (command, option))
    words = [*command.split(), *BESIDE.get((command, option), ())]
    for action in parser._actions:
        if not action.option_strings and command != "ablate":  # whose word is no path
            words.append("no/such")
        elif action.required:
            words += [action.option_strings[0], INPUTS.get(action.option_strings[0], str(tmp_path / "out"))]
    if command == "ablate":
        words += ["--model", "no-such-model"]
    if command == "plan" and option not in ("--max-drop", "--min-cosine", "--target-macs", "--target-params"):
        words += ["--min-cosine", "0.9"]
    for value in TRIED:
        code = None
        try:
            code = cli.main([*words, f"{option}={value}"])
        except SystemExit as exit:
            code = exit.code
        text = capsys.readouterr().err
        named = option in text or f"{value!r}: expected" in text
        assert code == 2 and "unexpected" not in text and "Traceback" not in text, (value, text)
        assert text.strip().count("\n") == 0 or text.startswith("usage:"), (value, text)
        assert named is (value != "0" or command not in ZERO.get(option, "").split()), (value, text)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", HUGE, "9" * 5000, "input:0x3x32x32"])
def test_a_batch_of_a_shape_is_a_number_that_a_machine_can_hold(text):
    with pytest.raises(UserError, match="expected x:Bx3x32x32 or a batch size B, from 1 to 65536"):
        _batch(text, "x", (3, 32, 32))
    assert _batch("65536", "x", (3, 32, 32)) == 65536


@pytest.mark.parametrize("option", ["--methods", "--allocations"])
def test_an_empty_list_of_ways_is_refused(option, tmp_path, capsys):
    words = ["plan", "no-such-model", "--data", "no/data", "--min-cosine", "0.9", "--out", str(tmp_path / "out")]
    assert cli.main([*words, f"{option}="]) == 2
    assert f"{option} is empty" in capsys.readouterr().err


def _models(kind=BaseModel):
    for sub in kind.__subclasses__():
        yield sub
        yield from _models(sub)


def test_no_configuration_holds_a_number_that_json_has_no_word_for():
    mine = {m for m in _models() if m.__module__.split(".")[0] in ("moee", "exporter") and not issubclass(m, Body)}
    floats = {m for m in mine if any("float" in str(f.annotation) for f in m.model_fields.values())}
    assert {m.__name__ for m in floats} >= {"ExpertsOptions", "ClearOptions", "FinetuneConfig", "Budget", "AblationConfig"}
    assert [m.__name__ for m in floats if m.model_config.get("allow_inf_nan", True)] == []


def test_figures_that_are_no_numbers_are_written_as_null():
    written = json_text({"a": math.nan, "b": [math.inf, 1.5], "c": (-math.inf, {"d": 2})})
    assert json.loads(written, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5], "c": [None, {"d": 2}]}
