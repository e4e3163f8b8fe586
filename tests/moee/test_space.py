"""Memory and disk before the work: estimates from shapes, what is there, smaller pieces within a bound, refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from exporter import cli
from exporter.terminal.space import size_of
from moee.bounds import size
from moee.config import FinetuneConfig
from moee.errors import MissingDependency, UserError
from moee.methods.heads.method import HeadsOptions
from moee.methods.recipe import Recipe, method_options
from moee.methods.tokens import TokensOptions
from moee.models.model import sharing
from moee.parallel.group import SOLO
from moee.shrinking.options import ShrinkConfig
from moee.space import machine, refusal
from moee.space.estimate import (
    Extraction,
    LayerShape,
    ModelShape,
    Need,
    export,
    extraction,
    refit,
    sensitivity,
    shrinking,
    tuning,
)
from moee.space.limits import USUAL, Limits
from moee.space.refusal import limits_within, loaded, refuse_without_space, worst
from moee.stages.space import Space, extraction_of
from tests.conftest import extract, tiny_images
from tests.reliability.runner import ROOT
from tests.reliability.tiny_vit import NAME

LARGE = ModelShape(303_301_632, 3 * 224 * 224, tuple(LayerShape(1024, 4096, 257) for _ in range(24)))
PAPER = Extraction(
    images=1000, held_out=100, tokens=126_080, clustered=6000, experts=4, objectives=2, measured=32_768, refitted=126_080,
    stream=True,
)  # fmt: skip


def test_a_vit_l_keeps_six_gigabytes_of_tokens():
    assert sum(need.disk_bytes for need in extraction(LARGE, PAPER)) == 2 * 126_080 * 1024 * 24


def test_smaller_pieces_take_less_and_are_the_same_for_the_same_bound():
    def needs(limits):
        return extraction(LARGE, PAPER, limits)

    usual = worst(needs(USUAL))
    for memory in (8 << 30, 7 << 30, 6 << 30):
        limits = limits_within(memory, LARGE.weights, needs, PAPER.refitted, 4096)
        assert limits == limits_within(memory, LARGE.weights, needs, PAPER.refitted, 4096)
        assert loaded(LARGE.weights) + worst(needs(limits)).memory_bytes <= memory < loaded(LARGE.weights) + usual.memory_bytes
        assert limits.backward < USUAL.backward and 4096 <= limits.refitted(PAPER.refitted) < PAPER.refitted
    assert limits_within(1 << 40, LARGE.weights, needs, PAPER.refitted, 4096) == USUAL
    smallest = limits_within(1 << 30, LARGE.weights, needs, PAPER.refitted, 4096)  # not even the weights
    assert smallest.refitted(PAPER.refitted) == 4096, "a neuron keeps a token"


def test_stages_that_are_not_asked_for_take_nothing():
    static = replace(PAPER, objectives=0, refitted=0)
    assert sensitivity(LARGE, static).memory_bytes == 0 and refit(LARGE, static).memory_bytes == 0
    assert {need.stage for need in extraction(LARGE, static)} == {"calibration", "clustering", "measurement"}


def test_what_the_options_ask_for_is_what_is_estimated():
    work = extraction_of(method_options(clustering="kmeans", clusters=16, neurons="eliminated", objective="output"), 10, 5, 3)
    assert (work.experts, work.objectives, work.by_density, work.jobs) == (16, 1, False, 3)
    assert extraction_of(method_options(collages=2, augment=1, compensation="refit"), 10, 5).images == 40
    assert extraction_of(method_options(compensation="mean"), 10, 5).refitted == 0
    assert extraction_of(FinetuneConfig(), 10, 5) is None


def test_the_tighter_of_two_limits():
    assert Limits(8, 4096, None, 2).tighter(Limits(32, 100, 50)) == Limits(8, 100, 50, 2)
    assert USUAL.tighter(USUAL) == USUAL


@pytest.mark.parametrize("text, size", [("8G", 8 << 30), ("7.5GiB", 15 << 29), ("900m", 900 << 20), ("1tb", 1 << 40)])
def test_sizes_as_people_write_them(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("value, came", [(8 << 30, 8 << 30), ("8G", 8 << 30)])
def test_python_takes_bytes_too(value, came):
    assert size("memory", value) == came


@pytest.mark.parametrize("value", ["8", "8X", "", "-8G", True, 8.5, 1000, 1 << 60, None, "9999999T"])
def test_what_is_no_size_is_refused_by_its_name(value):
    with pytest.raises(UserError, match="^memory: expected a size from 64M to 1024T, such as 8G; came "):
        size("memory", value)


def test_experts_that_become_fewer_stay_within_a_bound(caplog, monkeypatch):
    monkeypatch.setattr(refusal, "available_memory", lambda: machine.Available(1 << 40, "free on this machine"))
    config, experts = ShrinkConfig(experts=4), 16

    def bounded(memory, asked=config):
        space = Space(SOLO, memory)
        space.shrunk(LARGE, asked, 1000, 100, experts)
        return space.limits

    work = Extraction(1000, 100, config.tokens, experts=experts, refitted=config.refit_tokens)
    needs = shrinking(LARGE, work)
    assert [need.stage for need in needs] == ["calibration", "comparison", "refit", "measurement"]
    caplog.set_level("INFO", "moee")
    assert bounded(None) == USUAL and "memory: about" in caplog.text
    most = loaded(LARGE.weights) + worst(needs).memory_bytes
    assert bounded(most) == USUAL and 4096 <= bounded(most - (1 << 27)).refitted(config.refit_tokens) < config.refit_tokens
    with pytest.raises(UserError, match="the refit takes about .* --memory allows 4.0 GiB; give a larger --memory, or "):
        bounded(4 << 30)
    dropped = shrinking(LARGE, replace(work, refitted=0))
    assert bounded(loaded(LARGE.weights) + worst(dropped).memory_bytes, ShrinkConfig(specialise=True)) == USUAL


def test_a_bound_that_nothing_fits_in_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["extract", NAME, "--random-weights", "0", "--data", "digits", "--memory", "100M", "--out", "out", "--no-trial-export"]
    assert cli.main(line) == 2
    said = capsys.readouterr().err
    assert re.search(r"takes about \S+ \wiB .* and --memory allows 100 MiB; give a larger --memory, or ", said), said
    assert list(tmp_path.iterdir()) == []


def test_memory_that_the_machine_lacks_is_refused():
    need = Need("refit", 1 << 60)
    with pytest.raises(MissingDependency, match=r"the refit takes about .* GiB of memory beside .*, and .* are .*--refit-tokens"):
        refuse_without_space([need], 1)
    refuse_without_space([Need("refit", 1)], 1)


def test_memory_that_may_not_suffice_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(refusal, "available_memory", lambda: machine.Available(1000, "free on this machine"))
    refuse_without_space([Need("refit", 1400)], 1)
    assert "memory may not suffice: the refit takes about 2 KiB" in caplog.text
    with pytest.raises(MissingDependency):
        refuse_without_space([Need("refit", 1600)], 1)


def test_a_disk_that_lacks_the_space_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(refusal, "free_disk", lambda folder: 1000)
    said = r"the calibration's tokens take \S+ \wiB in .*, and 1 KiB are free there; .* --scratch DIR"
    with pytest.raises(MissingDependency, match=said):
        Space(SOLO).find(LARGE, Recipe.of(method_options()), 1000, 10)
    with pytest.raises(MissingDependency, match="the graphs take .* --out on a larger disk"):
        refuse_without_space([export(1 << 20)], 1 << 20, folder=tmp_path)


def test_a_system_that_does_not_tell_refuses_nothing(monkeypatch, tmp_path):
    """No /proc, no control groups."""
    for name in ("STATUS", "MEMINFO", "OWN_GROUP", "GROUPS"):
        monkeypatch.setattr(machine, name, tmp_path / "none")
    assert machine.available_memory() is None
    refuse_without_space([Need("refit", 1 << 60)], 1)
    assert machine.free_disk(tmp_path / "to" / "be" / "made") > 0


@pytest.mark.parametrize(("kind", "flag"), [("RLIMIT_AS", "-v"), ("RLIMIT_DATA", "-d")])
def test_limits_on_the_process_count(monkeypatch, kind, flag):
    limits = {getattr(machine.resource, kind): (1 << 60, 1 << 60)}
    unlimited = (machine.resource.RLIM_INFINITY,) * 2
    monkeypatch.setattr(machine.resource, "getrlimit", lambda of: limits.get(of, unlimited))
    monkeypatch.setattr(machine, "_machine", lambda: None)
    monkeypatch.setattr(machine, "_groups", lambda: None)
    there = machine.available_memory()
    assert (1 << 60) - (1 << 50) < there.size_bytes < 1 << 60 and there.limit.endswith(f"(ulimit {flag})")


def test_the_least_of_control_groups_counts(monkeypatch, tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, most, held in ((inner, "max", 0), (inner.parent, "5000", 3000), (tmp_path, "9000000000000000", 10)):
        (folder / "memory.max").write_text(most)
        (folder / "memory.current").write_text(str(held))
        (folder / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    (tmp_path / "own").write_text("0::/a/b\n")
    monkeypatch.setattr(machine, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    assert machine.available_memory() == (3000, "left by the control group's limit")


def test_a_fine_tuning_is_cut_into_parts_that_the_memory_holds(monkeypatch):
    monkeypatch.setattr(refusal, "available_memory", lambda: machine.Available(1 << 40, "free on this machine"))
    space = Space(SOLO, loaded(LARGE.weights) + tuning(LARGE, 32, 8, 1000).memory_bytes)
    config = FinetuneConfig()
    assert space.tuned(LARGE, config, 1000) == config.model_copy(update={"accumulate": 8})
    assert Space(SOLO).tuned(LARGE, config, 1) == config, "no bound, no change"
    with pytest.raises(UserError, match="fine-tuning .* --memory .*--checkpointing"):
        Space(SOLO, 1 << 30).tuned(LARGE, config, LARGE.weights)


def test_smaller_pieces_give_the_same_experts(tiny_model):
    """But for rounding, where nothing is drawn a batch."""
    data, options = tiny_images(48), method_options(clustering="kmeans", clusters=3, tokens=600, refit_tokens=400, keep=0.8)
    other = tiny_model_again = sharing(tiny_model, tiny_model)
    extract(tiny_model, data, options)
    extract(other, data, options, limits=Limits(forward=5, backward=100))
    for (name, one), two in zip(tiny_model.state_dict().items(), tiny_model_again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)


def test_a_copy_that_shares_weights_leaves_the_dense_model_alone(tiny_model):
    from moee.methods.registry import METHODS

    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    copy = sharing(tiny_model, tiny_model)
    assert all(a is b for a, b in zip(copy.parameters(), tiny_model.parameters(), strict=True)) and METHODS
    extract(copy, tiny_images(48), method_options(clustering="kmeans", clusters=3, tokens=600, refit_tokens=400, keep=0.8))
    assert all(torch.equal(before[name], value) for name, value in tiny_model.state_dict().items())


def test_every_part_of_a_recipe_is_estimated():
    heads = HeadsOptions(attention_macs=0.75, attention_tokens=2000)
    work = extraction_of(method_options(), 100, 5, first=(heads,))
    assert (work.narrowed, work.probes) == (2000, heads.attention_probes)
    assert [need.stage for need in extraction(LARGE, work)][:2] == ["narrower heads", "calibration"]
    assert [need.stage for need in extraction(LARGE, extraction_of(TokensOptions(), 100, 5))] == ["measurement"]
    solved = extraction(LARGE, extraction_of(method_options("corp"), 100, 5))
    assert [need.stage for need in solved] == ["calibration", "statistics", "solution", "measurement"]
    images = [extraction(LARGE, extraction_of(method_options("lowrank"), n, 5))[0] for n in (10, 100, 200, 300)]
    assert {need.stage for need in images} == {"decomposition"} and images[2] == images[3], "of 200 images at most"
    assert [need.memory_bytes for need in images[:3]] == sorted({need.memory_bytes for need in images})


def test_one_expert_stores_what_its_budget_leaves():
    static = method_options(method="static", target_macs=0.7)
    assert extraction_of(static, 10, 5, share=0.6).kept == pytest.approx(0.5)
    assert extraction_of(method_options(method="static", target_macs=0.7, mlp_floor=0.8), 10, 5, share=0.6).kept == 0.8
    heads = HeadsOptions(attention_macs=0.75)
    for other in (method_options(method="static", keep=0.9), method_options(target_macs=0.7)):
        assert extraction_of(other, 10, 5, share=0.6).kept == 1
    assert extraction_of(static, 10, 5, first=(heads,), share=0.6).kept == 1, "the heads save some of it"
    needs = [{n.stage: n for n in extraction(LARGE, replace(PAPER, kept=kept))}["measurement"] for kept in (0.5, 1.0)]
    assert needs[1].memory_bytes - needs[0].memory_bytes == 24 * 4096 * 1024 * 4


SMALL = ["vit_small_patch14_dinov2", "--img-size", "224", "--model-kwargs", "depth=2"]
FEW = ["--tokens", "20000", "--refit-tokens", "20000"]
EXTRACTIONS = {
    "static": [*SMALL, "--preset", "static", *FEW],
    "experts to the stream, beside narrower heads": [
        *SMALL, *FEW, "--clustering", "kmeans", "--clusters", "8", "--cluster-tokens", "4000", "--neurons", "eliminated",
        "--refit-target", "stream", "--sensitivity-tokens", "4096", "--attention-macs", "0.75", "--attention-tokens", "16000",
        "--attention-probes", "4",
    ],
    "corp": [*SMALL, "--method", "corp", "--tokens", "20000"],
    "lowrank": [*SMALL, "--method", "lowrank"],
    "tokens": [*SMALL, "--method", "tokens"],
    "a wide model": [
        "vit_base_patch16_224", "--model-kwargs", "depth=2", "--clustering", "kmeans", "--clusters", "4",
        "--cluster-tokens", "2000",
    ],
    "swin": ["swin_tiny_patch4_window7_224", "--preset", "static"],
    "convnext": ["convnext_tiny", "--preset", "static"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTRACTIONS)
def test_an_estimate_is_what_is_taken_at_most_and_little_more(tmp_path, name):
    """What a command says before its work against what it took, by the process's peak."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 96), ("val", 16)):
        for number in range(count):
            folder = tmp_path / "images" / part / f"c{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 255, (14, 14, 3), dtype=np.uint8))
            coarse.resize((224, 224), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    done = subprocess.run(
        [sys.executable, "-m", "exporter.cli", "extract", *EXTRACTIONS[name], "--random-weights", "0",
            "--data", tmp_path / "images", "--out", tmp_path / "o", "--no-trial-export"],
        capture_output=True, text=True, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = re.search(r"memory: about ([\d.]+) GiB at the peak", done.stdout + done.stderr)
    took = re.search(r"peak memory ([\d.]+) GiB", done.stdout)
    assert -0.05 <= float(said[1]) - float(took[1]) <= 0.3 * float(took[1]), (said[0], took[0])  # what is said is rounded
