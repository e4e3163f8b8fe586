"""Options that do nothing beside others: said before anything is read. For those of methods see `moee.methods.idle`."""

from __future__ import annotations

import argparse

from moee.errors import UserError

NO_ENGINE = "for engines, which --engine names"


def keep_defaults(parser: argparse.ArgumentParser) -> None:
    """Remember what the options of a command are when they are not given. Call it once all are declared."""
    kept = {a.dest: (a.option_strings[0], a.default) for a in parser._actions if a.option_strings and a.dest != "help"}
    parser.set_defaults(kept=kept)


def given_flags(args: argparse.Namespace, *names: str) -> list[str]:
    """Which of these options have another value than they have when they are not given, as `--flag`."""
    return [flag for name in names for flag, default in [args.kept[name]] if getattr(args, name) != default]


def refuse_idle(args: argparse.Namespace, why: str, *names: str) -> None:
    """Raise `UserError` if one of these options is given, which would do nothing; `why` says what it is for."""
    if flags := given_flags(args, *names):
        are, them = ("is", "it") if len(flags) == 1 else ("are", "them")
        raise UserError(f"{' and '.join(flags)} {are} {why}; leave {them} out")
