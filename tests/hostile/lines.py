"""Command lines run in this process up to their first heavy step, and what every one of them must keep to."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from exporter import cli
from exporter.terminal.options import flag_of
from moee.ablation.grid import AblationConfig
from moee.config import FinetuneConfig
from moee.errors import printable
from moee.methods.registry import METHODS
from moee.planning.budget import Budget
from tests.reliability.tiny_vit import NAME

PARSER = cli.build_parser()
MODELS = {
    "finetune": [FinetuneConfig], "ablate": [AblationConfig], "plan": [Budget, *(m.options for m in METHODS)],
    "compress": [Budget], "extract": [method.options for method in METHODS],
}  # fmt: skip
# where the work begins: reading an artifact, loading a model with its data, compiling, timing
HEAVY = (
    "moee.store.artifact.read_json", "moee.stages.session.Session.__init__", "exporter.engines.plugin_cache.ensure_plugin",
    "exporter.engines.plugin_cache.ensure_kernels", "exporter.timing.dispatch_bench.bench_dispatch",
    "exporter.timing.dispatch_bench.synthetic_layer", "exporter.demo.run_demo", "exporter.report.write_report",
    "exporter.doctor.checks",
)  # fmt: skip
MAX_SENTENCE = 2100


class Reached(BaseException):
    """The line passed everything that is said before the work."""


@dataclass(frozen=True)
class Outcome:
    """`code` is None where the work would have begun. `text` is standard error."""

    code: int | None
    text: str

    @property
    def name(self) -> str:
        return "taken" if self.code in (None, 0) else "refused"


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser, by its words."""
    found, todo = {}, [((), PARSER)]
    while todo:
        words, parser = todo.pop()
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in inner:
            todo += [((*words, name), sub) for name, sub in action.choices.items()]
        if not inner:
            found[" ".join(words)] = parser
    return dict(sorted(found.items()))


COMMANDS = commands()


def options(command: str) -> dict[str, argparse.Action]:
    """The options of a command by the name that its user writes."""
    return {
        next(o for o in action.option_strings if o.startswith("--")): action
        for action in COMMANDS[command]._actions
        if action.option_strings and action.dest != "help"
    }


def field_of(command: str, option: str):
    """The field that an option is made from, or None."""
    for kind in MODELS.get(command, ()):
        for name, field in kind.model_fields.items():
            if flag_of(name) == option:
                return field
    return None


def base(command: str, without: Sequence[str] = ()) -> list[str]:
    """The shortest line of a command that begins to work, without some of its options."""
    words = command.split()
    for action in COMMANDS[command]._actions:
        if not action.option_strings:
            words += [NAME if action.dest == "model" else "artifact"] * (action.nargs not in ("?", "*"))
        elif action.required and action.option_strings[0] not in without:
            words += [action.option_strings[0], {"--data": "images", "--sm": "87"}.get(action.option_strings[0], "new")]
    if command == "plan" and not {"--max-drop", "--min-cosine", "--target-macs", "--target-params"} & set(without):
        words += ["--min-cosine", "0.9"]
    if command in ("extract", "plan", "compress", "ablate", "ablate-clear") and not {"--random-weights", "--pretrained",
                                                                                    "--checkpoint"} & set(without):
        words += ["--random-weights", "0"]
    if command == "shrink" and not {"--experts", "--specialise"} & set(without):
        words += ["--experts", "2"]
    if command == "ablate" and "--model" not in without:
        words += ["--model", NAME]
    return words


@contextmanager
def stopped() -> Iterator[None]:
    """A block in which work does not begin: `Reached` is raised in its place."""

    def reached(*args, **kwargs):
        raise Reached

    with ExitStack() as held:
        for name in HEAVY:
            held.enter_context(patch(name, reached))
        held.enter_context(patch.object(cli, "build_parser", lambda shown=None: PARSER))
        yield


def run(words: Sequence[str], capsys) -> Outcome:
    """Run a line, within `stopped`."""
    code: int | None
    try:
        code = cli.main(list(words))
    except Reached:
        code = None
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    return Outcome(code, capsys.readouterr().err)


def check(outcome: Outcome, words: Sequence[str], place: Path, before: set[str], option: str | None = None) -> None:
    """What holds for every line: a known exit code, one sentence that names the option, nothing left behind."""
    said = (outcome, [word[:60] for word in words])
    assert outcome.code in (None, 0, 1, 2, 3), said
    assert "Traceback" not in outcome.text and "unexpected" not in outcome.text.replace("unexpected)", ""), said
    if outcome.code not in (None, 0):
        sentence = outcome.text.strip().splitlines()[-1] if outcome.text.strip() else ""
        assert sentence.startswith("moee") and len(sentence) < MAX_SENTENCE, said
        assert "Input should" not in sentence and "validation error" not in sentence, said
        assert option is None or option in sentence or "--out" in sentence or "expected one that holds" in sentence, said
    assert printable(outcome.text.replace("\n", "")), said
    assert {entry.name for entry in os.scandir(place)} == before, said
