"""Ahead-of-time build: all kernels for the wanted architectures, as cubin and PTX with a manifest, on a CPU.

    python -m plugins.aot --sm 87 --sm 89 --out build/kernels

Every compiled kernel is cached under a hash of what went into it (its source and that of the device functions it
calls, settings, target, compiler versions), so a second build only copies files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path

import triton

from moee.parallel.machine import usable_cpus
from moee.places.output_folder import OutputFolder
from moee.store.atomic import atomic_folder
from moee.store.home import cache_home
from moee.store.leftovers import sweep_all
from moee.store.result_kinds import KERNELS
from moee.store.scratch import temporary_folder
from plugins.aot import manifest
from plugins.aot.compile import Compiled, Job, compile_job, ptxas_version, settings_of, uses_token_type
from plugins.aot.manifest import Kernel, Manifest, TacticEntry
from plugins.aot.pool import FreshProcesses
from plugins.contract import DTYPES
from plugins.devices import HOW, sm_named
from plugins.tactics import SPECS, TACTICS, VARIANTS, Config
from plugins.targets import DEFAULT_SMS, target

Progress = Callable[[int, int, str], None]
SOURCES = Path(__file__).resolve().parent.parent
# A process pool costs a few seconds to start; below this many kernels one process is faster.
POOL_FROM = 24


def build_kernels(
    out_dir: str | Path,
    sms: Sequence[int] = DEFAULT_SMS,
    progress: Progress | None = None,
    *,
    dtypes: Sequence[str] = DTYPES,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
) -> Manifest:
    """Build every kernel for `sms` and `dtypes` into the folder `out_dir`, written atomically; returns its manifest.

    `progress(done, total, label)` is called after each kernel. An earlier build in `out_dir` is replaced; a folder
    that holds anything else is refused. Raises ValueError for an unknown SM or dtype, GateError if a kernel spills or
    lacks tensor-core instructions.
    """
    sms = tuple(dict.fromkeys(target(int(sm)).sm for sm in sms))
    if not sms:
        raise ValueError("no SM given; name at least one")
    unknown = [d for d in dtypes if d not in DTYPES]
    if unknown or not dtypes:
        raise ValueError(f"dtypes must be some of {DTYPES}, got {list(dtypes)}")
    out = Path(out_dir)
    output = OutputFolder(out, KERNELS, force=True)
    output.check()

    entries = list(plan(sms, dtypes))
    jobs = list(dict.fromkeys(job for job, _ in entries))
    store = Path(cache_dir) if cache_dir else default_cache()
    store.mkdir(parents=True, exist_ok=True)
    sweep_all(store)
    missing = [job for job in jobs if not cached(store, job)]
    done = len(jobs) - len(missing)
    if progress and done:
        progress(done, len(jobs), f"{done} from cache")
    for job in _compile_all(missing, store, workers):
        done += 1
        if progress:
            progress(done, len(jobs), job.name)

    with output.write() as staging:
        compiled = {job: read_cache(store, job) for job in jobs}
        for c in compiled.values():
            (staging / c.kernel.cubin).write_bytes(c.cubin)
            (staging / c.kernel.ptx).write_bytes(c.ptx.encode())
        result = Manifest(
            source_sha256=source_sha256(),
            triton=triton.__version__,
            ptxas=", ".join(sorted({ptxas_version(target(sm).ptxas) for sm in sms})),
            tactics=tuple(
                TacticEntry.model_validate({name: fields[name] for name in TacticEntry.model_fields})
                for fields in map(asdict, TACTICS)
            ),
            kernels=tuple(compiled[job].kernel.model_copy(update={"dtype": dtype}) for job, dtype in entries),
        )
        (staging / manifest.FILE_NAME).write_bytes(result.to_json().encode())
    return manifest.load(out, verify_files=False)


def plan(sms: Iterable[int], dtypes: Iterable[str]) -> Iterator[tuple[Job, str]]:
    """(job, dtype it serves) of every manifest entry. Kernels that never touch T are one job for all dtypes."""
    dtypes = tuple(dtypes)
    for sm in sms:
        for dtype in dtypes:
            for role, variant in VARIANTS[dtype]:
                yield Job(role, variant, dtype if uses_token_type(SPECS[role]) else "any", sm), dtype


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/moee/kernels`, by default under `~/.cache`."""
    return cache_home() / "moee" / "kernels"


@cache
def source_sha256() -> str:
    """Hash of everything that decides what the kernels do and how they are compiled."""
    digest = hashlib.sha256()
    files = [
        *sorted((SOURCES / "kernels").glob("*.py")),
        *(SOURCES / name for name in ("tactics.py", "targets.py", "aot/compile.py")),
    ]
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def key(job: Job, settings: Config | None = None) -> str:
    """Cache key: source with all called device functions, settings (None: the table's), target, and compiler versions."""
    goal = target(job.sm)
    settings = settings or settings_of(job)
    parts = {
        "job": asdict(job),
        "kernel": SPECS[job.role].fn.cache_key,
        "config": asdict(settings),
        "grid": SPECS[job.role].grid,
        "target": asdict(goal),
        "triton": triton.__version__,
        "ptxas": ptxas_version(goal.ptxas),
        "compile": hashlib.sha256((SOURCES / "aot" / "compile.py").read_bytes()).hexdigest(),
        "inspect": hashlib.sha256((SOURCES / "aot" / "cubin.py").read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached(store: Path, job: Job) -> bool:
    """Whether the cache holds this kernel, undamaged."""
    try:
        read_cache(store, job)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def read_cache(store: Path, job: Job) -> Compiled:
    """The cached kernel; ValueError if its files do not match their hash."""
    folder = store / key(job)
    data = json.loads((folder / "kernel.json").read_text())
    kernel = Kernel.model_validate(data["kernel"])
    binary, ptx = (folder / "kernel.cubin").read_bytes(), (folder / "kernel.ptx").read_text()
    if hashlib.sha256(binary).hexdigest() != kernel.sha256 or hashlib.sha256(ptx.encode()).hexdigest() != data["ptx"]:
        raise ValueError(f"{folder} is damaged")
    return Compiled(kernel, binary, ptx)


def compile_apart(job: Job, settings: Config | None = None, *, gates: bool = True) -> Compiled:
    """`compile_job` with the compilers' own files in a folder that goes away with it, even after a kill."""
    with temporary_folder() as scratch:
        usual, tempfile.tempdir = tempfile.tempdir, str(scratch)
        try:
            return compile_job(job, settings, gates=gates)
        finally:
            tempfile.tempdir = usual


def compile_into(store: Path, job: Job, name: str) -> Job:
    """Compile one kernel and put it into the cache under `name`, its key as the calling process sees it."""
    result = compile_apart(job)
    with atomic_folder(store / name, force=True) as staging:
        (staging / "kernel.cubin").write_bytes(result.cubin)
        (staging / "kernel.ptx").write_bytes(result.ptx.encode())
        entry = {"kernel": result.kernel.model_dump(), "ptx": hashlib.sha256(result.ptx.encode()).hexdigest()}
        (staging / "kernel.json").write_bytes(json.dumps(entry).encode())
    return job


def _compile_all(jobs: list[Job], store: Path, workers: int | None) -> Iterator[Job]:
    workers = workers or min(usable_cpus(), 8)
    if workers == 1 or len(jobs) < POOL_FROM:
        for job in jobs:
            yield compile_into(store, job, key(job))
        return
    with FreshProcesses(workers) as pool:
        futures = [pool.submit(compile_into, store, job, key(job)) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description="Build the kernels for the given GPUs (no GPU needed).")
    parser.add_argument("--sm", action="append", help=f"device, repeatable: {HOW}; default {DEFAULT_SMS}")
    parser.add_argument("--out", default="build/kernels")
    parser.add_argument("--workers", type=int, default=None, help="processes; default: one a core, at most 8")
    parser.add_argument("--cache-dir", default=None, help=f"compiled kernels; default {default_cache()}")
    options = parser.parse_args(arguments)

    def show(done: int, total: int, label: str) -> None:
        print(f"[{done}/{total}] {label}", flush=True)

    try:
        sms = [sm_named(name) for name in options.sm or map(str, DEFAULT_SMS)]
        result = build_kernels(options.out, sms, show, cache_dir=options.cache_dir, workers=options.workers)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(result.kernels)} kernels for sm {', '.join(map(str, result.sms))} in {options.out}")
    return 0
