"""An interrupted run goes on only with the configuration, seed, data and model that it began with, and says what differs."""

from __future__ import annotations

import shutil

import pytest

from tests.reliability import faults
from tests.reliability.commands import ABLATE, COMMANDS, GRID, KMEANS, MODEL, copy, prepare
from tests.reliability.runner import tree
from tests.reliability.test_disk import sentence
from tests.reliability.test_kill import under
from tests.reliability.tiny_vit import write_images, write_weights


def other_pixels(run):
    """The same file names and labels, other images."""
    shutil.rmtree(run / "images")
    write_images(run / "images", seed=1)


def more_images(run):
    shutil.rmtree(run / "images")
    write_images(run / "images", train=11)


def other_weights(run):
    write_weights(run / "w.safetensors", seed=1)


@pytest.fixture(scope="module")
def interrupted(zygote, tmp_path_factory):
    """A copy of the workspace of a command that was killed late in its run."""
    made = {}

    def of(name, target):
        if name not in made:
            command = COMMANDS[name]
            work = prepare(zygote, tmp_path_factory.mktemp("resume"), command)
            shutil.rmtree(work / command.out, ignore_errors=True)
            changes = zygote.run(command.argv, copy(work, target / "whole")).changes
            outcome = zygote.run(command.argv, work, mode=faults.KILL, at=changes * 3 // 4)
            assert outcome.killed
            made[name] = work
        return copy(made[name], target / "run")

    return of


FINETUNE = ["finetune", "extracted", "--epochs", "3", "--out", "tuned"]
PLAN = COMMANDS["plan"].argv
CASES = {
    "finetune, learning rate": ("finetune", [*FINETUNE, "--lr", "1e-3"], None, "config.lr"),
    "finetune, epochs": ("finetune", [*FINETUNE[:3], "4", *FINETUNE[4:]], None, "config.epochs"),
    "finetune, seed": ("finetune", [*FINETUNE, "--seed", "1"], None, "config.seed"),
    "finetune, other images": ("finetune", FINETUNE, other_pixels, "content"),
    "finetune, more images": ("finetune", FINETUNE, more_images, "images"),
    "plan, tokens": ("plan", [*PLAN, "--refit-tokens", "100"], None, "base.refit_tokens"),
    "plan, seed": ("plan", [*PLAN, "--seed", "1"], None, "base.seed"),
    "plan, model": ("plan", PLAN, other_weights, "model.weights_sha256"),
    "plan, images": ("plan", PLAN, other_pixels, "images"),
    "ablate, tokens": ("ablate", [*COMMANDS["ablate"].argv, "--tokens", "500"], None, "tokens 600, now 500"),
    "ablate, model": ("ablate", ["ablate", "--model", *MODEL, *ABLATE, "--out", "ablation"], other_weights, "weights_sha256"),
    "ablate, images": ("ablate", COMMANDS["ablate"].argv, other_pixels, "images"),
    "ablate-clear, rank": (
        "ablate-clear", ["ablate-clear", *MODEL, *GRID, "--residual-rank", "2", "--out", "ablation-clear"], None, "rank",
    ),
    "ablate-clear, model": ("ablate-clear", COMMANDS["ablate-clear"].argv, other_weights, "weights_sha256"),
    "ablate-clear, images": ("ablate-clear", COMMANDS["ablate-clear"].argv, more_images, "images"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_another_run_is_refused_and_the_difference_named(case, zygote, interrupted, place):
    name, argv, change, named = CASES[case]
    run = interrupted(name, place)
    if change:
        change(run)
    before = tree(run, raw=True)
    said = sentence(zygote.run(argv, run), (2,))
    assert named in said, said
    assert tree(run, raw=True) == before


def test_finetuning_of_another_model_is_refused(zygote, interrupted, place):
    run = interrupted("finetune", place)
    assert zygote.run([*COMMANDS["extract"].before, "--force"], run).code == 0
    assert "another weights" in sentence(zygote.run(FINETUNE, run), (2,))


@pytest.mark.parametrize("what", ["seed", "keep", "tokens", "weights", "images"])
def test_extraction_takes_nothing_from_another_ones_cache(what, zygote, interrupted, place):
    """The cache is full of the labels of an interrupted run; a different run makes what it would make with an empty one."""
    argv = COMMANDS["extract"].argv
    flags = {"seed": ["--seed", "1"], "keep": ["--keep", "0.6"], "tokens": ["--tokens", "300"]}.get(what, [])
    run = interrupted("extract", place)
    assert list((run / "cache" / "labels").glob("*.safetensors"))
    if what in ("weights", "images"):
        {"weights": other_weights, "images": other_pixels}[what](run)
    results = []
    for cache in ("cache", "empty"):
        shutil.rmtree(run / "extracted", ignore_errors=True)
        outcome = zygote.run([*argv, *flags], run, env={"MOEE_CACHE": str(run / cache)})
        assert outcome.code == 0, outcome.text
        results.append(under(tree(run), "extracted"))
    assert results[0] == results[1] and results[0]


def test_keep_is_not_part_of_the_key_on_purpose(zygote, interrupted, place):
    """Clustering does not depend on the kept share, so an extraction with another one reuses the labels."""
    run = interrupted("extract", place)
    assert zygote.run(COMMANDS["extract"].argv, run).code == 0
    before = under(tree(run), "cache")
    assert zygote.run([*COMMANDS["extract"].argv[:-1], "second", "--keep", "0.6", *KMEANS], run).code == 0
    assert under(tree(run), "cache") == before
