"""Streams, environments and names of files that a person has: every command line ends as it should there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporter import cli
from tests.hostile.host import NOT_HERE
from tests.reliability.runner import ROOT
from tests.reliability.tiny_vit import NAME, write_images, write_weights

INSPECT = ["inspect", NAME]
WRONG = ["inspect", "no-such-model–"]


def extract(data: str = "images", weights: str = "w.safetensors", out: str = "out") -> list[str]:
    return ["extract", NAME, "--data", data, "--checkpoint", weights, "--method", "static", "--target-macs", "0.7",
        "--tokens", "200",
            "--out", out, "--no-trial-export"]  # fmt: skip


STREAMS = {  # what is other than usual, the line, and its exit code
    "stdin closed": ({"closed": [0]}, INSPECT, 0), "stdout closed": ({"closed": [1]}, INSPECT, 0),
    "stderr closed": ({"closed": [2]}, INSPECT, 0), "all streams closed": ({"closed": [0, 1, 2]}, INSPECT, 0),
    "all streams closed, and work": ({"closed": [0, 1, 2]}, extract(out="closed"), 0),
    "stdout closed, bad input": ({"closed": [1]}, WRONG, 2), "stderr closed, bad input": ({"closed": [2]}, WRONG, 2),
    "all closed, bad input": ({"closed": [0, 1, 2]}, WRONG, 2), "ASCII output": ({"encoding": "ascii"}, INSPECT, 0),
    "ASCII output, bad input": ({"encoding": "ascii"}, WRONG, 2), "Latin-1 output": ({"encoding": "latin-1"}, INSPECT, 0),
    "ASCII output, help": ({"encoding": "ascii"}, ["extract", "--help"], 0),
    "a pipe that nobody reads": ({"stdout": "pipe without a reader"}, INSPECT, 1),
    "help into a pipe that nobody reads": ({"stdout": "pipe without a reader"}, ["--help"], 1),
    "JSON into a pipe that nobody reads": ({"stdout": "pipe without a reader"}, [*INSPECT, "--json"], 1),
    "help into a pipe that ends early": ({"stdout": "pipe that ends early"}, ["extract", "--help"], 0),  # argparse's own
    "a pipe that nobody reads, and work": ({"stdout": "pipe without a reader"}, extract(out="not-read"), 1),
    "a full device, and work": ({"stdout": "full"}, extract(out="not-shown"), 3),
    "a full device as stdout": ({"stdout": "full"}, INSPECT, 3),
    "JSON to a full device": ({"stdout": "full"}, [*INSPECT, "--json"], 3),
    "help to a full device": ({"stdout": "full"}, ["--help"], 3),
}  # fmt: skip
ENVIRONMENTS = {
    "TERM=dumb": {"TERM": "dumb"}, "no TERM": {"TERM": None}, "40 columns": {"COLUMNS": "40"}, "1 column": {"COLUMNS": "1"},
    "COLUMNS of text": {"COLUMNS": "wide"}, "COLUMNS of 10^12": {"COLUMNS": "1000000000000"},
    "COLUMNS below zero": {"COLUMNS": "-5"},
    "no HOME": {"HOME": None}, "HOME empty": {"HOME": ""}, "HOME not there": {"HOME": "/nowhere/at/all"},
    "XDG_CACHE_HOME empty": {"XDG_CACHE_HOME": ""}, "XDG_CACHE_HOME not there": {"XDG_CACHE_HOME": "/nowhere/at/all"},
    "XDG_CACHE_HOME a file": {"XDG_CACHE_HOME": "/dev/null"}, "MOEE_CACHE empty": {"MOEE_CACHE": ""},
    "LC_ALL=C": {"LC_ALL": "C"}, "LANG unknown": {"LANG": "xx_YY.KOI8-R"}, "NO_COLOR": {"NO_COLOR": "1"},
    "FORCE_COLOR": {"FORCE_COLOR": "1"}, "TMPDIR not there": {"TMPDIR": "/nowhere"}, "TMPDIR empty": {"TMPDIR": ""},
    "PATH empty": {"PATH": ""}, "OMP_NUM_THREADS of text": {"OMP_NUM_THREADS": "x"}, "TZ unknown": {"TZ": "Mars/Olympus"},
    "RANK without WORLD_SIZE": {"RANK": "0"}, "WORLD_SIZE alone": {"WORLD_SIZE": "8"},
}  # fmt: skip
SLOW = {"a clock that jumps, and work", "a read-only HOME, and work", "read-only data", "no temporary space",
    "no space where it is written"}  # fmt: skip
HOME = {"HOME": "WORK/fixed", "MOEE_CACHE": None, "XDG_CACHE_HOME": None}
LIMITS = {  # what the system does not give, the line, its exit code, and a part of what is said
    "no /proc": ({"proc": "none"}, INSPECT, 0, ""),
    "no /proc, and work": ({"proc": "none"}, extract(out="no-proc"), 0, ""),
    "no thread": ({"tasks": 1}, INSPECT, 0, ""),
    "no thread, and work": ({"tasks": 1}, extract(out="no-thread"), 3, "raise the limit on processes and threads (ulimit -u)"),
    "a clock that jumps": ({"clock": "jumps"}, INSPECT, 0, ""),
    "a clock that jumps, and work": ({"clock": "jumps"}, extract(out="new-clock"), 0, ""),
    "a read-only HOME": ({"fixed": ["fixed"], "env": HOME}, INSPECT, 0, ""),
    "a read-only HOME, and work": ({"fixed": ["fixed"], "env": HOME}, extract(out="new-home"), 0, ""),
    "read-only data": ({"fixed": ["images"]}, extract(out="new-data"), 0, ""),
    "a read-only place": ({"fixed": ["fixed"]}, extract(out="fixed/out"), 2, "Read-only file system"),
    "no temporary space": (
        {"small": {"little": 16384}, "env": {"TMPDIR": "WORK/little"}}, extract(out="no-space"), 3, "--scratch"
    ),
    "no space where it is written": ({"small": {"little": 16384}}, extract(out="little/out"), 3, "No space left on device"),
    "no process that reads ahead": ({"tasks": 11}, [*extract(out="no-process"), "--workers", "4"], 0, "this one reads them"),
}  # fmt: skip
NAMES = {
    "a space": "a b", "brackets": "set[red]", "a closing tag": "[", "a link": "[link=file:x]y", "quotes": "it's \"it\"",
    "a back quote": "`x`",
    "a dollar": "$(x)", "a backslash": "a\\b", "a percent": "100%s", "braces": "{0}", "a colon": "a:b", "a comma": "a,b",
    "an equals sign": "a=b", "a hash": "#a", "an ampersand": "a&b;c", "an umlaut": "Größe", "a composed accent": "e\u0301",
    "Japanese": "画像",
    "an ideographic space": "a\u3000b", "right to left": "תמונות", "a picture": "🙂",
    "200 characters": "x" * 200, "a dot in front": ".hidden",
    "a dash in front": "./-x", "a tilde in front": "./~x", "a name of built-in data": "./digits", "stars": "a*?",
    "a plus": "a+b@c",
}  # fmt: skip
ALL_AT_ONCE = "a [red]b[ it's \"q\" `y` $(x) \\ %s {0} Größe e\u0301 画像 \u3000 🙂 a:b,c=d#e&f;*?+@"
REFUSED = {
    "undecodable out": (extract(out="\udcff"), "--out"), "undecodable data": (extract(data="im\udcff"), "--data"),
    "undecodable weights": (extract(weights="w\udcff.safetensors"), "--checkpoint"), "a line end": (extract(out="a\nb"), "--out"),
    "a tab": (extract(out="a\tb"), "--out"), "an escape": (extract(out="\x1b[31mx"), "--out"),
    "a zero-width space": (extract(out="a\u200bb"), "--out"),
    "a part of 300 characters": (extract(out="x" * 300), "cannot"), "a path of 5,000": (extract(out="x/" * 2500), "--out"),
    "~ in quotes": (extract(out="~/x"), "--out"), "out is a link": (extract(out="link"), "is a link to"),
    "out is the data": (extract(out="images"), "--out"),
    "out in the data": (extract(out="images/train/new"), "--out"), "out holds the data": (extract(out="."), "--out"),
    "out is above": (extract(out=".."), "--out"),
    "out is a file": (extract(out="w.safetensors"), "--out"), "out below a file": (extract(out="w.safetensors/x"), "--out"),
    "out in /proc": (extract(out="/proc/x"), "cannot write"), "out in /dev/null": (extract(out="/dev/null/x"), "--out"),
    "out is the root": (extract(out="/"), "--out"),
    "data not there": (extract(data="nowhere"), "train/CLASS/*.jpg"), "data is a file": (extract(data="w.safetensors"),
    "it is a file"),
    "data is empty": (extract(data="empty"), "no images"), "data is a link to itself": (extract(data="loop"), "loop"),
    "data of a broken link": (extract(data="broken"), "broken"),
    "weights are a folder": (extract(weights="images"), "--checkpoint"),
    "weights are a broken link": (extract(weights="broken"), "--checkpoint"),
    "weights are empty": (extract(weights="empty.safetensors"), "valid safetensors"),
    "weights are a device": (extract(weights="/dev/zero"), "no ordinary file"),
    "model is a path": (["inspect", "./nowhere"], "nowhere"), "model is a link to itself": (["inspect", "loop"], "loop"),
    "a folder that was removed": (["inspect", "gone/x"], "gone/x"),
}  # fmt: skip


def outcomes(work: Path, cases: list[dict]) -> dict[str, dict]:
    """Run the cases in one warm process, in their order."""
    base = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MOEE_CACHE": str(work.parent / "cache")}
    given = json.dumps([{"work": str(work), **case} for case in cases])
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.host"],
        input=given, capture_output=True, text=True, cwd=ROOT, timeout=900, env={**os.environ, **base}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {answer["name"]: answer for answer in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory):
    """What came of every case that a chosen test asks for, and the folder that they ran in."""
    chosen = {item.name.partition("[")[2][:-1] or item.name for item in request.session.items}
    work = tmp_path_factory.mktemp("hostile") / "work"
    write_images(work / "images", train=4, val=2)
    write_weights(work / "w.safetensors")
    for split in ("train", "val"):  # names that others gave, and that nobody typed
        for old, new in (("class0", b"\xff"), ("class1", b"a\nb[red]"), ("class2", "\u202ecba".encode())):
            folder = os.path.join(os.fsencode(work / "odd" / split), new)
            shutil.copytree(os.fsencode(work / "images" / split / old), folder)
            os.rename(os.path.join(folder, b"0.png"), os.path.join(folder, b"\xfe\n.png"))
            with open(os.path.join(folder, b"\x1b[31m.png"), "wb") as file:
                file.write(b"no picture")
    for name in ("empty", "fixed", "little"):
        (work / name).mkdir()
    (work / "empty.safetensors").touch()
    for name, target in (("link", "images"), ("loop", "loop"), ("broken", "nowhere")):
        (work / name).symlink_to(target)
    inside = sorted(path.name for path in work.iterdir())
    cases = [{"name": name, "words": words, **how} for name, (how, words, _) in STREAMS.items()]
    cases += [{"name": name, "words": INSPECT, "env": env} for name, env in ENVIRONMENTS.items()]
    cases += [{"name": name, "words": words} for name, (words, _) in REFUSED.items()]
    cases += [{"name": name, "words": words, **how} for name, (how, words, *_) in LIMITS.items() if name not in SLOW - chosen]
    cases += [{"name": "odd classes", "words": extract("odd", out="odd-out")}, {"name": "odd classes, again",
        "words": ["inspect", "odd-out"]}]
    chosen |= {"odd classes", "odd classes, again"} if "test_classes_and_pictures_of_odd_names" in chosen else set()
    if "test_nothing_is_left_behind" not in chosen:
        cases = [case for case in cases if case["name"] in chosen]
    if "test_a_name_of_odd_characters_is_taken_and_shown_as_it_is" in chosen:
        cases += named(work, {"all at once": ALL_AT_ONCE})
    found = outcomes(work, cases)
    found["left"] = sorted(path.name for path in work.iterdir() if path.name not in inside)
    return found, work


def named(work: Path, names: dict[str, str]) -> list[dict]:
    """Cases that take data and weights under a name, write there, and read what they wrote."""
    cases = []
    for number, (name, text) in enumerate(names.items()):
        folder = Path(work, f"n{number}", text)
        folder.mkdir(parents=True)
        for part in ("images", "w.safetensors"):
            (folder / part).symlink_to(work / part)
        where = f"n{number}/{text.removeprefix('./')}"
        cases.append({"name": name, "words": extract(*(f"{where}/{part}" for part in ("images", "w.safetensors", "out")))})
        cases.append({"name": f"{name}, again", "words": ["inspect", f"{where}/out"]})
    return cases


def written(work: Path, found: dict, name: str, number: int, text: str) -> None:
    """Both commands ended well, and the first showed the place as it is called."""
    kept_to(found[name], 0)
    kept_to(found[f"{name}, again"], 0)
    out = f"n{number}/{text.removeprefix('./')}/out"
    assert f"written to {out}; " in found[name]["out"], found[name]["out"]
    assert (work / out / "moee.json").is_file()


def kept_to(answer: dict, code: int) -> None:
    """What holds of every case."""
    assert answer["code"] == code, answer
    for text in (answer["out"], answer["err"]):
        assert "Traceback" not in text and "unexpected" not in text and "Exception ignored" not in text, answer


@pytest.mark.parametrize("name", STREAMS)
def test_streams_that_are_closed_full_or_of_another_encoding(answers, name, tried):
    found, work = answers
    how, words, code = STREAMS[name]
    kept_to(found[name], code)
    shown = found[name]["out"] + found[name]["err"]
    if how.get("encoding") == "ascii":
        assert shown.isascii() and ("x" in shown), shown
    if code == 2 and 2 not in how.get("closed", ()):
        assert found[name]["err"].startswith("moee: unknown model")
    if name == "all streams closed, and work":
        header = (work / "closed" / "model.safetensors").read_bytes()[8:9]
        assert header == b"{", "what a library printed was written into a file of weights"
    if "--out" in words:
        place = work / words[words.index("--out") + 1]
        assert (place / "moee.json").is_file() or not (code == 0 or place.exists()), "whole, or not there"
    tried("streams", name, {0: "done", 1: "ended", 2: "refused", 3: "refused"}[code])


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments(answers, name, tried):
    found, _ = answers
    kept_to(found[name], 0)
    tried("environments", name, "done")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="another user's limits and mounts need root")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LIMITS])
def test_a_system_that_gives_less(answers, name, tried):
    """No /proc, no more processes and threads for this user, no space, nowhere to write, no true clock."""
    found, work = answers
    how, words, code, said = LIMITS[name]
    if found[name]["code"] == NOT_HERE:
        pytest.skip("this machine lets nobody change mounts")
    kept_to(found[name], code)
    assert said in found[name]["err"], found[name]["err"]
    if words is not INSPECT:
        assert (work / words[words.index("--out") + 1] / "moee.json").is_file() == (code == 0)
    tried("limits", name, "done" if code == 0 else "refused")


def test_a_name_of_odd_characters_is_taken_and_shown_as_it_is(answers, tried):
    """Of data, weights and the output; what was recorded is read again by a later command."""
    found, work = answers
    written(work, found, "all at once", 0, ALL_AT_ONCE)
    tried("names of files", "all at once", "done")


def test_classes_and_pictures_of_odd_names(answers, tried):
    """Undecodable, with line ends, markup and marks of another direction, and files that are no pictures."""
    found, work = answers
    kept_to(found["odd classes"], 0)
    kept_to(found["odd classes, again"], 0)
    shown = found["odd classes"]["out"] + found["odd classes"]["err"]
    assert "\x1b" not in shown and "\u202e" not in shown and "skipped 6 unreadable images" in shown, shown
    assert r"\x1b[31m.png" in found["odd classes"]["out"], "spelt out, so that the file can be found"
    classes = json.loads((work / "odd-out" / "moee.json").read_text())["classes"]
    assert len(classes) in (0, 3) and all(name.isprintable() for name in classes), classes
    tried("names of files", "classes and pictures", "done")


@pytest.mark.slow
@pytest.mark.timeout(1000)  # a busy machine
def test_every_odd_name_alone(tmp_path, tried):
    work = tmp_path / "work"
    write_images(work / "images", train=4, val=2)
    write_weights(work / "w.safetensors")
    found = outcomes(work, named(work, NAMES))
    for number, (name, text) in enumerate(NAMES.items()):
        written(work, found, name, number, text)
        tried("names of files", name, "done")


@pytest.mark.parametrize("name", REFUSED)
def test_places_that_cannot_be_are_refused_in_one_sentence(answers, name, tried):
    found, _ = answers
    kept_to(found[name], 2)
    sentence = found[name]["err"].splitlines()[-1]
    assert sentence.startswith("moee: ") and REFUSED[name][1] in sentence, found[name]["err"]
    if name.startswith("out "):
        assert found[name]["err"].count("\n") == 1, "refused before anything was read"
    tried("places", name, "refused")


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
@pytest.mark.parametrize("count", ["1000000", "99999999999999999999", "100000,4", "0000000100000"])
def test_threads_without_number_are_refused(monkeypatch, capsys, name, count, tried):
    """PyTorch's pools end the process there."""
    monkeypatch.setenv(name, count)
    assert cli.main(["inspect", "test_vit"]) == 2
    said = capsys.readouterr().err
    assert f"{name}: expected at most " in said and said.count("\n") == 1, said
    tried("environments", f"{name} of {count}", "refused")


def test_an_empty_cache_folder_is_not_the_current_one(monkeypatch, tried):
    from moee.store.cache import cache_dir
    from plugins.aot.build import default_cache

    for name in ("MOEE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert cache_dir().is_absolute() and default_cache().is_absolute()
    tried("environments", "where the cache lies", "done")


def test_nothing_is_left_behind(answers):
    found, _ = answers
    assert [name for name in found["left"] if not name.startswith("n")] == ["closed", "odd-out"]


def test_a_process_of_its_own_in_all_of_it_at_once(tmp_path, tried):
    """Started as a shell starts it, without what the warm process emulates."""
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "TERM": "dumb",
        "PYTHONIOENCODING": "ascii", "COLUMNS": "40", "XDG_CACHE_HOME": "",
    }  # fmt: skip
    line = f"{sys.executable} -m exporter.cli inspect vit_tiny_patch16_224 <&- 2>&-"
    done = subprocess.run(["sh", "-c", f"{line}; echo code $?"], capture_output=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.stdout.isascii() and done.stdout.endswith(b"code 0\n") and b"blocks.11.mlp" in done.stdout, done.stdout.decode()
    assert list(tmp_path.iterdir()) == []
    tried("environments", "all at once in a process of its own", "done")
