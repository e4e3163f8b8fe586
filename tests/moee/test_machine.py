"""CPUs that may be used, and half precision that pays."""

import os

import pytest
import torch

from moee.config import FinetuneConfig
from moee.parallel import machine
from moee.train import finetuning


def test_affinity_counts(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    monkeypatch.setattr(machine, "_quota", lambda: None)
    assert machine.usable_cpus() == 3


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000", 8), ("150000 100000", 2), ("1000 100000", 1), ("", 8), ("3 0", 8), ("900000 100000", 8)]
)
def test_a_containers_quota_counts(monkeypatch, tmp_path, text, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(machine, "CGROUP_LIMIT", tmp_path / "cpu.max")
    assert machine.usable_cpus() == cpus


def test_no_code_counts_cpus_that_the_process_may_not_use():
    from tests.test_architecture import ROOT

    files = [f for package in ("moee", "exporter", "plugins", "scripts") for f in (ROOT / package).rglob("*.py")]
    asking = [f.name for f in files if "os.cpu_count" in f.read_text() and f.name != "machine.py"]
    assert asking == [], "these take moee.parallel.machine.usable_cpus"


@pytest.mark.parametrize(
    ("found", "amp", "fast"),
    [
        ({"avx2": True}, "bf16", False),
        ({"avx512_bf16": True}, "bf16", True),
        ({"avx512_bf16": True}, "fp16", False),
        ({"amx_fp16": True}, "fp16", True),
        ({"neon": True, "fp16_arith": True}, "fp16", True),
        ({"bf16": False}, "bf16", False),
    ],
)
def test_half_precision_is_fast_where_the_cpu_has_instructions_for_it(monkeypatch, found, amp, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert machine.fast_on_cpu(amp) is fast


def test_training_takes_float32_where_half_precision_is_slow_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(finetuning, "fast_on_cpu", lambda amp: False)
    assert finetuning.affordable(FinetuneConfig(amp="fp16")).amp == "off"
    assert "--force-amp" in caplog.text and "fp16" in caplog.text
    assert finetuning.affordable(FinetuneConfig(amp="fp16", force_amp=True)).amp == "fp16"
    monkeypatch.setattr(finetuning, "fast_on_cpu", lambda amp: True)
    assert finetuning.affordable(FinetuneConfig(amp="bf16")).amp == "bf16"
