"""Tries mutants: each in a fork of a process that has collected the tests.

Most mutants lie in functions. In the fork the code of the live functions is replaced, and only those tests run that call one of
them: milliseconds beside the tests themselves. Others (constants, defaults, decorators, fields) are tried by all tests in a fork
that has loaded nothing of ours yet, where the mutated text is imported in place of the file. Nothing is written into the source
tree.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from tests.mutation.modules import Module
from tests.mutation.mutants import Mutant

KILLED, SURVIVED, ENDLESS, FRESH = "killed", "survived", "endless", "fresh"
PRELOADED = ("torch", "timm", "onnxscript.optimizer", "onnxruntime", "torch.onnx._internal.exporter._core", "hypothesis")
LEAST_S, SLACK = 10.0, 10.0  # how long a test may take: so long, and so many times what it takes without a fault
MEMORY = 24 << 30
OURS = ("moee", "exporter", "plugins")
FLAGS = ("-q", "-x", "-p", "no:cacheprovider", "-n", "0")
Name = tuple[str, str]  # of a function: its file, its qualified name


def preload() -> None:
    """Import what takes long and is not ours."""
    for name in PRELOADED:
        importlib.import_module(name)


def tried(root: Path, module: Module, mutants: list[Mutant], until: float, kept: Path) -> Iterator[tuple[Mutant, str]]:
    """Each mutant and what became of it, until the clock `until`. `kept`: a folder for what the tests do without a mutant. Raises
    `RuntimeError` where tests fail without one."""
    reader, writer = os.pipe()
    pid = _forked(lambda: _collected(root, module, mutants, writer, until, kept))
    os.close(writer)
    late, seconds, broken = [], 0.0, ""
    with os.fdopen(reader) as lines:
        for line in lines:
            kind, value = json.loads(line)
            if kind == "baseline":
                seconds = value
            elif kind == "broken":
                broken = value
            elif value == FRESH:
                late.append(mutants[kind])
            else:
                yield mutants[kind], value
    os.waitpid(pid, 0)
    if broken or not seconds:
        raise RuntimeError(f"tests of {module.name} fail without a mutant: {broken or 'collection'}")
    for mutant in late:
        if time.time() > until:
            return
        yield mutant, _outcome(_forked(lambda mutant=mutant: _fresh(root, module, mutant)), [4 * LEAST_S + SLACK * seconds])


def _forked(work: Callable[[], int]) -> int:
    """The number of a process that does `work` and ends with its answer."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        code = work()
    finally:
        os._exit(code)


def _outcome(pid: int, limits_s: list[float], progress: mmap.mmap | None = None) -> str:
    """What became of a trial. It is ended where a test, which `progress` counts, takes longer than its limit."""
    test, started = 0, time.perf_counter()
    while time.perf_counter() < started + limits_s[test]:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return SURVIVED if status == 0 else FRESH if os.waitstatus_to_exitcode(status) == 4 else KILLED
        if progress is not None and progress[0] + 256 * progress[1] != test:
            test, started = progress[0] + 256 * progress[1], time.perf_counter()
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return ENDLESS


def _places() -> str:
    """One folder for the files of all tests, made anew by each fork: what ends a fork clears nothing up."""
    return f"--basetemp={tempfile.gettempdir()}/tests"


def _quiet() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)


def _fresh(root: Path, module: Module, mutant: Mutant) -> int:
    """All tests with the mutant imported in place of its file."""
    _quiet()
    sys.meta_path.insert(0, _InPlace(root, mutant))
    return 0 if pytest.main([*FLAGS, _places(), *module.tests]) == 0 else 1


class _InPlace(importlib.abc.MetaPathFinder):
    def __init__(self, root: Path, mutant: Mutant):
        self.name = mutant.file.removesuffix(".py").replace("/", ".")
        self.path, self.text = str(root / mutant.file), mutant.text

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        loader = SourceFileLoader(name, self.path)
        loader.get_code = lambda _: compile(self.text, self.path, "exec", dont_inherit=True)  # type: ignore[method-assign]
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def _collected(root: Path, module: Module, mutants: list[Mutant], writer: int, until: float, kept: Path) -> int:
    """Collect the tests, and try the mutants in forks."""
    _quiet()
    with os.fdopen(writer, "w") as lines:
        return int(pytest.main([*FLAGS, _places(), *module.tests], plugins=[_Trials(root, module, mutants, lines, until, kept)]))


class _Trials:
    """In place of pytest's loop over the tests."""

    def __init__(self, root: Path, module: Module, mutants: list[Mutant], lines: Any, until: float, kept: Path):
        self.root, self.mutants, self.lines, self.until = root, mutants, lines, until
        self.files = {str(root / source): source for source in module.sources}
        texts = [(root / file.partition("::")[0]).read_bytes() for file in (*module.sources, *module.tests) if file[0] != "-"]
        self.kept = kept / f"{module.name}-{hashlib.sha256(b''.join(texts)).hexdigest()[:16]}.json"
        self.calls: dict[str, set[Name]] = {}  # by test, and by fixture, which other tests use too
        self.owner, self.failed = "", ""

    def say(self, kind: Any, value: Any) -> None:
        self.lines.write(json.dumps([kind, value]) + "\n")
        self.lines.flush()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        told = self.told(session)
        if told["failed"]:
            self.say("broken", told["failed"])
            return True
        seconds: dict[str, float] = told["seconds"]
        calls = {test: {tuple(name) for name in names} for test, names in told["calls"].items()}
        self.say("baseline", sum(seconds.values()))
        quick = sorted(session.items, key=lambda item: seconds[item.nodeid])
        codes = {file: _codes(compile((self.root / file).read_text(encoding="utf-8"), path, "exec", dont_inherit=True))
                 for path, file in self.files.items()}  # fmt: skip
        progress = mmap.mmap(-1, 2)  # shared with the forks
        for number, mutant in enumerate(self.mutants):
            if time.time() > self.until:
                return True
            path = str(self.root / mutant.file)
            swaps = _swaps(codes[mutant.file], _codes(compile(mutant.text, path, "exec", dont_inherit=True)))
            names = {(mutant.file, old.co_qualname) for old in swaps}
            items = [item for item in quick if swaps and calls[item.nodeid] & names]
            if not items:
                self.say(number, FRESH)
                continue
            progress[:2] = bytes(2)
            pid = _forked(lambda items=items, swaps=swaps: self.trial(items, swaps, progress))
            self.say(number, _outcome(pid, [LEAST_S + SLACK * seconds[item.nodeid] for item in items], progress))
        return True

    def told(self, session: pytest.Session) -> dict[str, Any]:
        """What the tests do without a mutant; of an earlier run where neither they nor the sources have changed since."""
        if session.testsfailed:
            return {"failed": "collection"}
        if self.kept.is_file():
            return dict(json.loads(self.kept.read_text()))
        reader, writer = os.pipe()
        pid = _forked(lambda: self.baseline(session.items, writer))
        os.close(writer)
        with os.fdopen(reader) as file:
            told = {"failed": "nothing ran"} | json.loads(file.read() or "{}")
        os.waitpid(pid, 0)
        if not told["failed"]:
            self.kept.write_text(json.dumps(told))
        return told

    def baseline(self, items: list[pytest.Item], writer: int) -> int:
        """All tests without a mutant: how long each takes, and which functions it calls."""
        sys.settrace(self.traced)
        threading.settrace(self.traced)
        seconds = {}
        for item, following in zip(items, [*items[1:], None], strict=True):
            started, self.owner = time.perf_counter(), item.nodeid
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            seconds[item.nodeid] = time.perf_counter() - started
        sys.settrace(None)
        calls = {}
        for item in items:
            fixtures = [str(id(f)) for found in item._fixtureinfo.name2fixturedefs.values() for f in found]  # type: ignore[attr-defined]
            calls[item.nodeid] = sorted(set().union(*(self.calls.get(owner, set()) for owner in (item.nodeid, *fixtures))))
        with os.fdopen(writer, "w") as file:
            json.dump({"failed": self.failed, "seconds": seconds, "calls": calls}, file)
        return 0

    def traced(self, frame: Any, event: str, arg: Any) -> None:
        code = frame.f_code
        if code.co_filename in self.files:
            self.calls.setdefault(self.owner, set()).add((self.files[code.co_filename], code.co_qualname))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        outer, self.owner = self.owner, str(id(fixturedef))
        try:
            return (yield)
        finally:
            self.owner = outer

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = f"{report.nodeid}: {report.longreprtext[-500:]}"

    def trial(self, items: list[pytest.Item], swaps: dict[CodeType, CodeType], progress: mmap.mmap) -> int:
        """The answer of the process: 0 if no test fails."""
        try:
            for function in [f for f in gc.get_objects() if isinstance(f, FunctionType) and f.__code__ in swaps]:
                function.__code__ = swaps[function.__code__]
        except ValueError:  # other variables of the outer function are used
            return 4
        for number, (item, following) in enumerate(zip(items, [*items[1:], None], strict=True)):
            progress[:2] = number.to_bytes(2, "little")
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return 1
        return 0


def _codes(code: CodeType) -> list[CodeType]:
    """A file's own code, and that of all its functions and classes, in order."""
    inner = [each for part in code.co_consts if isinstance(part, CodeType) for each in _codes(part)]
    return [code, *inner]


def _swaps(old: list[CodeType], new: list[CodeType]) -> dict[CodeType, CodeType]:
    """Functions whose code differs; nothing where something else does."""
    if [code.co_qualname for code in old] != [code.co_qualname for code in new]:
        return {}
    different = {a: b for a, b in zip(old, new, strict=True) if _own(a) != _own(b)}
    if not all(a.co_flags & inspect.CO_OPTIMIZED for a in different):  # of the module or a class
        return {}
    # the code of a function holds that of the functions in it
    return {a: b for a, b in zip(old, new, strict=True)
            if a.co_flags & inspect.CO_OPTIMIZED and any(part in different for part in _codes(a))}  # fmt: skip


def _own(code: CodeType) -> tuple[Any, ...]:
    constants = tuple(repr(part) for part in code.co_consts if not isinstance(part, CodeType))
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
