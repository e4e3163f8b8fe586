"""The command line: `moee COMMAND`. Each command parses its flags, calls one function and shows the result.

Exit codes: 0 ok, 1 a gate or a step failed (or a bug), 2 usage or bad input, 3 the environment lacks something, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from exporter.commands import demo, doctor, plots, report
from exporter.commands.engines import bench, bench_dispatch, build, bundle, export, plugin, verify
from exporter.commands.models import ablate, ablate_clear, compress, extract, finetune, inspect, plan, shrink
from exporter.terminal import ranks, streams
from exporter.terminal.failures import explain
from exporter.terminal.flags import BAD_INPUT, GATE_FAILED, OK, check_outputs
from exporter.terminal.interrupts import ARRIVED, lose_none
from exporter.terminal.loading import load
from exporter.terminal.ui import plain_console
from moee.cures import offering
from moee.errors import StepFailed, UserError, plain, printable
from moee.schema import shown
from moee.store.scratch import scratch_in
from moee.version import VERSION

COMMANDS = (
    compress, plan, extract, finetune, shrink, export, verify, bench, bench_dispatch, build, bundle, plugin, inspect, plots,
    report, ablate, ablate_clear, doctor, demo,
)  # fmt: skip


SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")  # that shtab knows; it is imported where a script is asked for
MOST_TEXT = 1024  # characters of a value: Linux takes paths of 4095 bytes, and nobody types them
MOST_SAID = 1500  # of a sentence about a line

USUAL = """usual sequence:
  moee doctor                                                      what is missing here
  moee extract MODEL --checkpoint FILE --data IMAGES --out model   fewer MACs
  moee finetune model --out tuned                                  if it lost too much
  moee export model --out export                                   ONNX graphs
  moee verify export --max-drop 1                                  the same answers, accuracy
  moee bench export                                                faster or not
  moee bundle export --sm orin --out bundle                        what a device needs
`moee COMMAND --help` says more."""


class PlainFormatter(logging.Formatter):
    """Messages alone; nothing in them steers the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(plain, super().format(record).split("\n")))


class Parser(argparse.ArgumentParser):
    """Whole names of flags alone, and one sentence for what is wrong with a line."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but what a command does not know is answered by that command, with the flag that is most like it."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            import difflib

            inner, word = parsers_of(self, found)[-1], rest[0].partition("=")[0]
            alike = difflib.get_close_matches(word, inner._option_string_actions, 1, 0.75) if word.startswith("-") else []
            inner.error(f"unrecognized arguments: {' '.join(rest)}" + "".join(f" (did you mean {flag}?)" for flag in alike))
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {shown(message, quoted=False, limit=MOST_SAID)}; see {self.prog} --help\n")


def build_parser(shown: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands. `shown`: the method whose options `extract --help` shows."""
    parser = Parser(
        prog="moee", description="Extract experts from Vision Transformers and ship them.", epilog=USUAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"moee {VERSION}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        if module is extract:
            extract.add_parser(subparsers, shown)
        else:
            module.add_parser(subparsers)
    what = "print a script that completes commands and flags in this shell"
    parser.add_argument("--print-completion", choices=SHELLS, action=PrintCompletion, help=what)
    name_values(parser)
    return parser


VALUES = {  # what help calls the value of a flag, in the place of the flag's own name
    "data": "IMAGES", "out": "DIR", "model": "DIR", "provider": "{cpu,cuda,tensorrt}", "backend": "NAME",
    "plugin": "FILE", "sm": "DEVICE",
    "device": "WHERE", "layer": "NAME", "design": "{star,full}", "precision": "{fp32,fp16,bf16,int8,int8-fp32}",
}  # fmt: skip
PLACES = ("out", "emit", "measured", "data", "confirm", "checkpoint", "plan", "recipe", "class_map", "scratch")  # on this machine
LISTED = "LIST"  # values with commas between them


def name_values(parser: argparse.ArgumentParser) -> None:
    """Let help say what kind of value each flag takes: N a whole number, X a number, or a word of `VALUES`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                name_values(inner)
        elif action.option_strings and action.metavar is None and action.nargs != 0 and action.choices is None:
            kind = getattr(action.type, "__annotations__", {}).get("return")
            by_type = {"int": "N", "float": "X"}.get(str(kind))
            action.metavar = by_type or VALUES.get(action.dest, LISTED)


class PrintCompletion(argparse.Action):
    """Prints the script of a shell and ends."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option: str | None = None) -> NoReturn:
        import shtab

        complete_files(parser, shtab.FILE)
        print(shtab.complete(parser, shell))
        parser.exit()


def complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Let a shell complete `files` for every value that may be one, and show it every flag."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                complete_files(inner, files)
            continue
        if action.help == argparse.SUPPRESS:
            action.help = ""
        if action.nargs != 0 and action.choices is None and action.type is None:
            action.complete = files  # type: ignore[attr-defined]


def shown_method(argv: Sequence[str]) -> str | None:
    """The method, or else the preset, that a line names, before it is parsed."""
    for flag in ("--method", "--preset"):
        for at, word in enumerate(argv):
            name, equals, value = word.partition("=")
            if name == flag and (equals or at + 1 < len(argv)):
                return value if equals else argv[at + 1]
    return None


def called(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, str]:
    """What the user calls the values of `args`: flags, or the metavars of what has none."""
    names = {}
    for each in parsers_of(parser, args):
        for action in each._actions:
            names[action.dest] = action.option_strings[0] if action.option_strings else action.metavar or action.dest.upper()
    return {name: str(word) for name, word in names.items()}


def parsers_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[argparse.ArgumentParser]:
    """The parser, that of the command that `args` name, and that of a command of its own."""
    found = [parser]
    for each in found:
        for action in each._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.append(action.choices[getattr(args, action.dest)])
    return found


def refuse_texts(args: argparse.Namespace, names: Mapping[str, str]) -> None:
    """Raise `UserError` for a value that is an empty text: as a path it would be the folder that the command runs in. Also for
    one that cannot be shown: manifests record names, and whoever reads them takes no such name."""
    for name, value in vars(args).items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(text, str):
                continue
            flag = names.get(name, name)
            if not text.strip():
                raise UserError(f"{flag} is empty; give a value, or leave it out")
            if name in PLACES and text.startswith("-"):  # as --out=-x
                raise UserError(f"{flag} {shown(text)} begins with a dash, and later commands would read a flag; write ./{text}")
            if len(text) > MOST_TEXT:
                raise UserError(f"{flag} is {len(text)} characters long; expected at most {MOST_TEXT}")
            if not printable(text):
                raise UserError(
                    f"{flag} {ascii(text)} holds a control character, or what is no character; rename that file or folder"
                )


def with_option(sentence: str, args: argparse.Namespace, names: Mapping[str, str]) -> str:
    """A sentence about bad input that quotes the value of one option, with that option's name where it lacks it."""
    owners = {
        names[name]
        for name, value in vars(args).items()
        if isinstance(value, str) and names.get(name, "").startswith("--")
        and (repr(value) in sentence or sentence.startswith(f"{value} "))
    }  # fmt: skip
    flag = next(iter(owners), "")
    return sentence if len(owners) != 1 or flag in sentence else f"{flag}: {sentence}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    # before torch is imported: OpenMP threads that spin at barriers slow a shared machine down about fivefold
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if argv is None:  # a process of its own
        streams.make_usable()
        lose_none()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(PlainFormatter())
    if not ranks.follower():
        logging.getLogger("moee").setLevel(logging.INFO)  # what a command read
    try:
        try:
            code = run(sys.argv[1:] if argv is None else argv)
        finally:
            streams.flush()
    except BrokenPipeError:  # the reader of a pipe is gone
        streams.drop_output()
        return GATE_FAILED
    except KeyboardInterrupt as error:  # before the words were read
        code, sentence = explain(error)
        print(f"moee: {sentence}", file=sys.stderr)
    except OSError as error:  # of the last lines that were shown
        streams.drop_output()
        code, sentence = explain(error)
        print(f"moee: standard output: {sentence}", file=sys.stderr)
    return code


def run(words: Sequence[str]) -> int:
    """Run a command line; returns the exit code. Raises `BrokenPipeError` where nobody reads what it shows, and `SystemExit`
    where its words are wrong or ask for help."""
    parser = build_parser(shown_method(words))
    if not words:
        parser.print_help()
        return OK
    args = parser.parse_args(words)
    flags = [flag for each in parsers_of(parser, args) for flag in each._option_string_actions]
    with offering(flags):  # for what a refusal advises
        return run_command(args, called(parser, args))


def run_command(args: argparse.Namespace, names: Mapping[str, str]) -> int:
    """As `run`, for a line that was read; `names`: what the user calls its values."""
    told = sys.stdout.isatty() or os.environ.get("COLUMNS")
    console = plain_console(width=None if told else 120, quiet=ranks.follower())
    try:
        refuse_texts(args, names)
        ranks.prepare(args)
        if not ranks.several():  # ranks do so together
            check_outputs(args)
        if "check" in args:
            args.check(args)
        if "loads" in args:
            load(args.loads)
        with scratch_in(getattr(args, "scratch", None)):
            return args.run(args, console)
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if args.debug and not isinstance(error, KeyboardInterrupt):
            raise
        code, sentence = explain(KeyboardInterrupt() if ARRIVED.is_set() and not isinstance(error, StepFailed) else error)
        if code == BAD_INPUT:
            sentence = with_option(sentence, args, names)
        if ranks.speaks(error):
            print(f"moee: {sentence}", file=sys.stderr)  # plainly: rich opens files of its own, which may be what fails
        ranks.leave(error, code)
        return code


if __name__ == "__main__":
    sys.exit(main())
