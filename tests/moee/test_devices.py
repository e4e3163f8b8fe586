"""Where torch computes, by name. The GPUs here are made up."""

import logging
from contextlib import nullcontext

import pytest
import torch

from exporter.cli import main
from exporter.terminal.failures import explain
from moee.clustering.pairwise import full_precision_products
from moee.errors import UserError
from moee.parallel import devices, joining
from moee.parallel.devices import Rank, chosen_device, computing_on, title_of
from moee.parallel.group import Group
from moee.parallel.joining import alone, joined, refuse_mixed

COMMANDS = {
    "extract": ["extract", "test_vit", "--data", "digits", "--random-weights", "0", "--out", "OUT"],
    "finetune": ["finetune", "nowhere", "--out", "OUT"],
    "verify": ["verify", "nowhere"],
    "plan": ["plan", "test_vit", "--data", "digits", "--random-weights", "0", "--target-macs", "0.7", "--out", "OUT"],
    "ablate": ["ablate", "--out", "OUT"],
    "ablate-clear": ["ablate-clear", "test_vit", "--data", "digits", "--random-weights", "0", "--out", "OUT"],
    "demo": ["demo", "--out", "OUT"],
}  # fmt: skip


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {torch.device(device).index}")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(devices, "_trouble", lambda device: "")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "CUDA", "cuda:x", "cuda:-1", "cuda:1 ", "cuda:0000", "cpu:0", "mps", ""])
def test_unknown_names_are_refused(two_gpus, name):
    with pytest.raises(UserError, match=r"--device .*expected auto, cpu, cuda or cuda:N"):
        chosen_device(name)


def test_without_a_gpu_auto_is_the_cpu_and_says_why(no_gpu, caplog):
    caplog.set_level(logging.INFO, "moee")
    assert alone("auto").device == torch.device("cpu") == alone("cpu").device
    assert caplog.messages == ["computing on the CPU: no GPU was found", "computing on the CPU"]
    with pytest.raises(UserError, match="--torch-device cuda: no GPU was found; give cpu, or leave --torch-device out"):
        chosen_device("cuda", option="--torch-device")


def test_a_torch_without_cuda_says_so(no_gpu, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "moee")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(UserError, match="--device cuda:0: this torch is built without CUDA"):
        chosen_device("cuda:0")
    alone()
    assert caplog.messages == ["computing on the CPU: this torch is built without CUDA"]


@pytest.mark.parametrize(("name", "expected"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_a_gpu_is_chosen_by_its_number(two_gpus, caplog, name, expected):
    caplog.set_level(logging.INFO, "moee")
    device = alone(name).device
    assert str(device) == expected
    title = f"{expected} (Card {device.index})" if device.type == "cuda" else "cpu"
    assert title_of(device) == title
    assert caplog.messages == [f"computing on {title}" if device.type == "cuda" else "computing on the CPU"]


def test_a_number_beyond_the_gpus_is_refused(two_gpus, monkeypatch):
    with pytest.raises(UserError, match="--device cuda:7: there are 2 GPUs, cuda:0 to cuda:1"):
        chosen_device("cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--device cuda:1: there is one GPU, cuda:0"):
        chosen_device("cuda:1")


def test_a_gpu_that_does_not_work_is_not_taken(two_gpus, monkeypatch, caplog):
    monkeypatch.setattr(devices, "_trouble", lambda device: "no kernel image is available")
    assert chosen_device("auto") == torch.device("cpu")
    assert caplog.messages == ["cuda:0 (Card 0) does not work here: no kernel image is available"]
    for name, rank in (("cuda", None), ("auto", Rank(2, 1, 2))):  # a rank must not differ from the others in silence
        with pytest.raises(UserError, match=rf"--device {name}: .*does not work here: no kernel image"):
            chosen_device(name, rank)


def test_trouble_is_found_by_computing(monkeypatch):
    """`cuda` without a driver or without CUDA raises as a broken one does."""
    assert devices._trouble(torch.device("cpu")) == ""
    monkeypatch.setattr(torch, "ones", lambda *a, **k: torch.full((2, 2), 3.0))
    assert devices._trouble(torch.device("cpu")) == "the sum of a product of ones is 72"

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(torch, "ones", broken)
    assert devices._trouble(torch.device("cpu")) == "no kernel image is available"


def test_each_rank_takes_the_gpu_of_its_number(two_gpus, monkeypatch):
    for name in ("auto", "cuda"):
        assert [str(chosen_device(name, Rank(4, local, 2))) for local in (0, 1)] == ["cuda:0", "cuda:1"]
    assert str(chosen_device("cpu", Rank(4, 1, 2))) == "cpu"
    assert str(chosen_device("cuda:1", Rank(1, 0, 1))) == "cuda:1"
    with pytest.raises(UserError, match="--device cuda:1 with 4 ranks: each has a GPU of its own; give cuda"):
        chosen_device("cuda:1", Rank(4, 1, 2))
    for name, rank in (("auto", Rank(3, 0, 3)), ("cuda", Rank(3, 2, None))):
        with pytest.raises(UserError, match="3 ranks on a machine of 2 GPUs: each needs one of its own; start fewer"):
            chosen_device(name, rank)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert str(chosen_device("auto", Rank(2, 1, 2))) == "cpu"
    with pytest.raises(UserError, match="--device cuda: this torch is built without NCCL"):
        chosen_device("cuda", Rank(2, 1, 2))


def test_one_rank_under_a_launcher_takes_the_device_that_is_named(two_gpus, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "moee")
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(str(device)))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined(device="cuda:1") as group:
        assert group.alone and str(group.device) == "cuda:1"
    with joined(device="cpu") as group:
        assert str(group.device) == "cpu"
    assert taken == ["cuda:1"] and caplog.messages == ["computing on cuda:1 (Card 1)", "computing on the CPU"]


def test_what_all_ranks_refuse_one_of_them_says(monkeypatch):
    waited = []
    monkeypatch.setattr(joining.time, "sleep", waited.append)
    for speaks in (True, False):
        with pytest.raises(UserError) as caught, joining._said_once(speaks):
            chosen_device("gpu")
        assert caught.value.speaks is speaks
    assert waited == [joining.SPOKEN_S], "the one that is silent waits"


def test_ranks_on_devices_of_two_kinds_are_refused():
    refuse_mixed(["cuda", "cuda"])
    with pytest.raises(UserError, match="rank 0 computes on cuda, rank 2 on cpu; give --device cpu, or a GPU to every rank"):
        refuse_mixed(["cuda", "cuda", "cpu"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_before_any_work(no_gpu, command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [str(tmp_path / "out") if word == "OUT" else word for word in COMMANDS[command]]
    option = "--torch-device" if command == "plan" else "--device"
    assert main([*words, "--torch-device", "cuda"]) == 2
    shown = capsys.readouterr()
    assert f"moee: {option} cuda: no GPU was found; give cpu, or leave {option} out" in shown.err
    assert "Traceback" not in shown.err and not list(tmp_path.iterdir())
    if command != "plan":
        assert main([*words, "--device", "quick"]) == 2
        assert "moee: --device 'quick': expected auto, cpu, cuda or cuda:N" in capsys.readouterr().err


def test_a_full_gpu_is_one_sentence_that_says_what_helps():
    code, sentence = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert code == 3 and sentence.startswith("the GPU is out of memory; use --torch-device cpu")
    assert "--batch-size" in sentence and "earlier results are as they were" in sentence


def test_float32_is_exact_on_a_gpu_and_the_settings_come_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings():
        return cudnn.conv.fp32_precision, matmul.fp32_precision, cudnn.benchmark, cudnn.deterministic

    before = settings()
    with pytest.raises(KeyError), computing_on(torch.device("cuda", 0)), full_precision_products():
        assert settings() == ("ieee", "ieee", False, True)
        raise KeyError
    assert settings() == before and before[0] != "ieee"
    with computing_on(torch.device("cpu")):
        assert settings() == before


def test_weights_are_not_moved_within_inference_mode_where_they_could_never_be_trained_again():
    moved = []

    class Recorded(torch.nn.Linear):
        def to(self, device):
            moved.append((str(device), torch.is_inference_mode_enabled()))
            return self

    with torch.inference_mode(), Group(device=torch.device("meta")).placed(Recorded(2, 2)):
        assert torch.is_inference_mode_enabled()
    assert moved == [("meta", False), ("cpu", False)]
