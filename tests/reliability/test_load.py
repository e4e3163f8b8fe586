"""Many runs in one process: flat memory and file handles. Many processes on one cache or one output: same bytes, no error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.reliability.commands import COMMANDS, KMEANS, MODEL, prepare
from tests.reliability.runner import ROOT, tree
from tests.reliability.soak import EXPORT_SLOPE_MIB, WARM_UP, verdict
from tests.reliability.test_kill import under

REPEATS = 20
MAX_SLOPE_MIB = 0.2  # a round, after warming up


def soak(folder, repeats, *names):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.reliability.soak", str(folder), *names, "--rounds", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def flat(rounds, warm_up):
    """Slope of the memory in MiB a round, and whether handles, threads and temporary files stay as they were."""
    after = rounds[warm_up:]
    slope = float(np.polyfit(range(len(after)), [r["rss_mib"] for r in after], 1)[0])
    assert len({r["handles"] for r in after}) == 1, [r["handles"] for r in rounds]
    assert len({r["threads"] for r in after}) == 1, [r["threads"] for r in rounds]
    assert len({r["temporary"] for r in after}) == 1, [r["temporary"] for r in rounds]
    assert {r["scratch"] for r in rounds} == {0}
    return slope


@pytest.mark.slow
def test_short_soak(place):
    rounds = soak(place, 5, "extract", "finetune")
    assert flat(rounds, 2) < 3, [r["rss_mib"] for r in rounds]


@pytest.mark.parametrize(
    ("changed", "said", "code"),
    [
        ({}, "grew: nothing", 0), ({"handles": 9}, "grew: handles", 1), ({"scratch": 1}, "grew: scratch", 1),
        ({"rss_mib": 2000.0}, "grew: rss_mib", 1),
    ],
)  # fmt: skip
def test_the_verdict_of_a_soak(changed, said, code):
    calm = {"rss_mib": 900.0, "handles": 7, "threads": 3, "temporary": 1, "scratch": 0}
    rounds = [dict(calm) for _ in range(WARM_UP + 4)]
    rounds[-1].update(changed)
    assert verdict(rounds)[0].endswith(said) and verdict(rounds)[1] == code
    assert verdict(rounds[: WARM_UP + 2])[1] == 1, "too few show nothing"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soak_of_the_whole_pipeline(place, record):
    rounds = soak(place, REPEATS)
    record("soak rounds", {"rounds": rounds})
    slope = flat(rounds, WARM_UP)
    record("soak", {"repeats": REPEATS, "warm_up": WARM_UP, "slope_mib": slope})
    assert slope < EXPORT_SLOPE_MIB, [r["rss_mib"] for r in rounds]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_soak_without_export(place, record):
    rounds = soak(place, REPEATS, "extract", "finetune", "verify", "bench", "report")
    record("soak without export", {"repeats": REPEATS, "rounds": rounds})
    assert flat(rounds, WARM_UP) < MAX_SLOPE_MIB, [r["rss_mib"] for r in rounds]


def extractions(count):
    return [["extract", *MODEL, *KMEANS, "--out", f"extracted{i}"] for i in range(count)]


def together_on_one_cache(zygote, place, count, rounds):
    work = prepare(zygote, place, COMMANDS["extract"])
    shutil.rmtree(work / "extracted")
    alone = zygote.run([*extractions(1)[0][:-1], "alone"], work)
    assert alone.code == 0
    expected = {k.partition("/")[2]: v for k, v in under(tree(work), "alone").items()}
    labels = tree(work / "cache" / "labels", raw=True)
    for _ in range(rounds):
        shutil.rmtree(work / "cache")
        for code, text in zygote.run_together(extractions(count), work):
            assert code == 0 and "Traceback" not in text, text
        for i in range(count):
            made = {k.partition("/")[2]: v for k, v in under(tree(work), f"extracted{i}").items()}
            assert made == expected
            shutil.rmtree(work / f"extracted{i}")
        assert tree(work / "cache" / "labels", raw=True) == labels  # no partial file, nothing left over
        assert list((work / "tmp").iterdir()) == []


@pytest.mark.slow
def test_extractions_together_on_one_cache(zygote, place):
    together_on_one_cache(zygote, place, count=3, rounds=1)


@pytest.mark.slow
def test_many_extractions_together_on_one_cache(zygote, place):
    together_on_one_cache(zygote, place, count=8, rounds=5)


def test_one_output_for_several(zygote, place):
    """With --force the last one stands, whole; without it one wins and the others are refused."""
    work = prepare(zygote, place, COMMANDS["extract"])
    argv = ["extract", *MODEL, *KMEANS, "--out", "same"]
    codes = [code for code, _ in zygote.run_together([argv] * 4, work)]
    assert sorted(codes) == [0, 2, 2, 2]
    first = under(tree(work), "same")
    results = zygote.run_together([[*argv, "--force"]] * 4, work)
    assert [code for code, _ in results] == [0] * 4, results
    assert under(tree(work), "same") == first
    assert not [p for p in work.iterdir() if p.name.startswith(".")]


SCRATCH = """
import sys
from pathlib import Path
import moee.train.scratch as scratch
real = scratch.train
def train(recipe, data=None, report=None):
    with open(sys.argv[1], "a") as file:
        file.write("x")
    return real(recipe)
scratch.train = train
print(scratch.scratch_spec(scratch.ScratchRecipe(depth=1, embed_dim=12, num_heads=1, epochs=1, warmup_epochs=0)).weights_sha256)
"""
KERNELS = """
import sys
from exporter.engines.plugin_cache import ensure_kernels
from plugins.aot import build
real = build.compile_into
def compile_into(*args):
    with open(sys.argv[1], "a") as file:
        file.write("x")
    return real(*args)
build.compile_into = compile_into
build.POOL_FROM = 1 << 30
build.DTYPES = ("float32",)
build.build_kernels.__kwdefaults__["dtypes"] = ("float32",)
print((ensure_kernels([87]) / "kernels.json").read_text())
"""


def processes(script, place, count):
    """Run `script` in `count` processes at once on an empty cache; what they print, and how often the work was done."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "MOEE_CACHE": str(place / "cache"), "XDG_CACHE_HOME": str(place / "xdg"),
    }  # fmt: skip
    command = [sys.executable, "-c", script, str(place / "work")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        for _ in range(count)
    ]
    printed = []
    for process in running:
        out, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-2000:]
        printed.append(out.strip().splitlines()[-1] if script is SCRATCH else out)
    return printed, (place / "work").stat().st_size


@pytest.mark.slow
def test_weights_are_made_once_by_several_processes(place):
    printed, times = processes(SCRATCH, place, 4)
    assert len(set(printed)) == 1 and times == 1
    assert len([p for p in (place / "cache").iterdir() if p.suffix == ".safetensors"]) == 1
    assert not list(place.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kernels_are_compiled_once_by_several_processes(place):
    printed, times = processes(KERNELS, place, 3)
    assert len(set(printed)) == 1
    store = [p for p in (place / "xdg" / "moee" / "kernels").iterdir() if p.is_dir()]
    assert times == len(store) > 0
    assert not list(place.rglob("*.tmp"))
