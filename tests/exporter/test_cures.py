"""What a refusal advises can be given where it is met: commands and Python functions share code, and not all options."""

import argparse
import errno

import pytest

from exporter.cli import build_parser, main
from exporter.terminal import failures
from exporter.terminal.failures import explain
from moee.artifacts.model import recorded_data
from moee.cures import NAMED, cures, offering, without
from moee.errors import MissingDependency, UserError
from moee.keywords import in_python
from moee.space import refusal
from moee.space.estimate import Need
from moee.space.machine import Available
from moee.space.refusal import CURES, refuse_without_space

COMMANDS = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def flags_of(command):
    return set(COMMANDS[command]._option_string_actions)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_refusal_for_space_names_an_option_that_the_command_lacks(command, monkeypatch, tmp_path):
    flags = flags_of(command)
    monkeypatch.setattr(refusal, "available_memory", lambda: Available(1 << 20, "free"))
    monkeypatch.setattr(refusal, "free_disk", lambda folder: 1)
    for stage in CURES:
        for bound in (None, 1 << 30) if "--memory" in flags else (None,):
            with offering(flags), pytest.raises((UserError, MissingDependency)) as caught:
                refuse_without_space([Need(stage, 1 << 40)], 1, bound)
            advice = str(caught.value).rpartition("; give ")[2]
            assert advice and set(NAMED.findall(advice)) <= flags, advice
    for stage in refusal.PLACES:
        with offering(flags), pytest.raises(MissingDependency) as caught:
            refuse_without_space([Need(stage, 1, 1 << 40)], 1, None, tmp_path)
        assert set(NAMED.findall(str(caught.value).rpartition("; give ")[2])) <= flags | {"--out"}


def test_ways_are_left_out_whose_options_are_not_there():
    assert cures("fewer images", "fewer --tokens") == "fewer images, or fewer --tokens", "all are there where nobody says"
    with offering(["--tokens"]):
        assert cures("a larger --memory", "fewer --tokens") == "fewer --tokens"
        assert cures("a larger --memory", elsewhere="close programs") == "close programs"
        assert without("blocks.1") == "moee extract leaves it dense with --exclude blocks.1"
        with offering(["--exclude"]):
            assert without("blocks.1") == "leave it dense with --exclude blocks.1"


def test_a_python_function_advises_its_own_keywords():
    @in_python()
    def work(data, tokens=1):
        raise UserError(f"too much; give {cures('fewer --jobs', 'fewer --tokens', 'a larger --memory')}")

    with pytest.raises(UserError, match="^too much; give fewer tokens$"):
        work("x")


def test_the_command_line_says_what_the_command_takes(monkeypatch, capsys):
    def fail(args, console):
        raise RuntimeError(f"[enforce fail] can't allocate memory {cures('a smaller --batch-size', 'fewer images')}")

    monkeypatch.setattr(failures, "_out_of_memory", lambda error: False)
    for command, expected in (("doctor", "fewer images"), ("finetune", "a smaller --batch-size, or fewer images")):
        monkeypatch.setattr(f"exporter.commands.{'' if command == 'doctor' else 'models.'}{command}.run", fail)
        main([command, *(["model", "--out", "x"] if command == "finetune" else [])])
        assert f"can't allocate memory {expected};" in capsys.readouterr().err


def test_a_copy_that_finds_no_space_names_where_it_goes():
    """`shutil.copy` names its source first, so the export was said to be full, and not the disk of the bundle."""
    full = OSError(errno.ENOSPC, "No space left on device", "export/moee.data", None, "small/.b.tmp/moee.data")
    assert explain(full)[1].startswith("small/.b.tmp/moee.data: No space left on device;")
    gone = OSError(errno.ENOENT, "No such file or directory", "export/moee.data", None, "b/moee.data")
    assert explain(gone)[1].startswith("export/moee.data: No such file")


@pytest.mark.parametrize("flag", ["--out", "--data", "--checkpoint"])
def test_a_place_that_later_commands_would_read_as_a_flag_is_refused(flag, capsys):
    """`--out=-dash` was taken, and what to do next was said to be `moee export -dash`."""
    others = [word for name in ("--out", "--data") if name != flag for word in (name, "x")]
    assert main(["extract", "vit_tiny_patch16_224", f"{flag}=-dash", *others]) == 2
    assert f"{flag} '-dash' begins with a dash, and later commands would read a flag; write ./-dash" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["python:ImageFolder", "hfds/some/set", "/no/such/folder"])
@pytest.mark.parametrize("command", ["bundle", "verify"])
def test_images_that_are_not_read_are_asked_for_where_they_can_be_given(command, source):
    flags = flags_of(command)
    with offering(flags), pytest.raises(UserError) as caught:
        recorded_data(source)
    assert ("with --data" in str(caught.value)) == ("--data" in flags) == (command == "verify"), caught.value
