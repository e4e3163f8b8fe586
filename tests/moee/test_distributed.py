"""Several processes on gloo: the same experts as one, byte for byte, and the same loss curves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.moee.distributed_worker import EXTRACTIONS, FEW, TUNINGS

ROOT = Path(__file__).resolve().parents[2]
# Loss curves of 1, 2 and 4 ranks. A loss of 3e-4 is what is left of float32 terms near 1, so that sums in another order move it
# by 1e-7; half precision rounds the products of other batch sizes differently.
SAME = dict(rtol=1e-4, atol=1e-7)
CURVE = {"bf16": dict(rtol=2e-2, atol=1e-6), "fp16": dict(rtol=5e-3, atol=1e-6)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(world: int, folder: Path, module: str = "tests.moee.distributed_worker", *args: str) -> list[subprocess.Popen]:
    """The ranks of a run, as torchrun would start them; output goes to `folder/rank-N.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    port, ranks = free_port(), []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in place.items()}
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MOEE_CACHE": str(folder / "cache")}
        with open(folder / f"rank-{rank}.log", "w") as log:
            command = [sys.executable, "-m", module, *(args or (str(folder),))]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    return ranks


def finish(ranks: list[subprocess.Popen], folder: Path, timeout: float = 300) -> None:
    for rank, process in enumerate(ranks):
        code = process.wait(timeout)
        assert code == 0, f"rank {rank} ended with {code}:\n{(folder / f'rank-{rank}.log').read_text()[-3000:]}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of one rank's run and of two ranks'."""
    root = tmp_path_factory.mktemp("ranks")
    started = {world: start(world, root / str(world)) for world in (1, 2)}
    for world, ranks in started.items():
        finish(ranks, root / str(world))
    return {world: root / str(world) for world in started}


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def same_bytes(a: Path, b: Path) -> None:
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{a.name}: {different[:5]} differ"
    assert a.read_bytes() == b.read_bytes()


def check_experts(one: Path, many: Path) -> None:
    for name in (*EXTRACTIONS, *(f"few-{name}" for name in FEW)):
        same_bytes(one / f"{name}.safetensors", many / f"{name}.safetensors")
    assert results(one)["experts"] == results(many)["experts"]
    assert sum(results(one)["passes"]) == sum(results(many)["passes"]) and min(results(many)["passes"]) > 0, "not shared"
    assert results(one)["sample"] == results(many)["sample"] == {"skipped": [3, *range(32, 64)]}
    same_bytes(one / "sample.safetensors", many / "sample.safetensors")
    same_bytes(one / "extracted" / "model.safetensors", many / "extracted" / "model.safetensors")
    assert "blocks.0.attn.q.weight" in load_file(one / "extracted" / "model.safetensors"), "no attention was narrowed"
    same_bytes(one / "extracted" / "probe.safetensors", many / "extracted" / "probe.safetensors")
    ours, theirs = (json.loads((p / "extracted" / "moee.json").read_text())["info"] for p in (one, many))
    for info in (ours, theirs):
        del info["stages"]["extracted"]["seconds"], info["peak_memory_bytes"]
    assert theirs.pop("ranks")["world"] > 1 and ours == theirs, "measurements on held-out images must not depend on the ranks"


def check_curves(one: Path, many: Path) -> None:
    ours, theirs = results(one)["tunings"], results(many)["tunings"]
    for name in TUNINGS:
        bound = CURVE.get(name, SAME)
        for curve in ("train", "validation"):
            a, b = torch.tensor(ours[name][curve]), torch.tensor(theirs[name][curve])
            torch.testing.assert_close(a, b, **bound, msg=lambda text, n=name, c=curve: f"{n}, {c}: {text}")
        assert ours[name]["best"] == theirs[name]["best"] == 2
    for curve in ("train", "validation"):
        a, b = (torch.tensor(results(p)["commands"]["losses"][curve]) for p in (one, many))
        torch.testing.assert_close(a, b, **SAME)


def test_two_ranks_find_the_same_experts(runs):
    check_experts(runs[1], runs[2])


def test_two_ranks_learn_along_the_same_curve(runs):
    check_curves(runs[1], runs[2])


@pytest.mark.parametrize("world", [1, 2])
def test_parts_and_checkpointing_leave_the_curve_alone(runs, world):
    curves = results(runs[world])["tunings"]
    plain = torch.tensor(curves["plain"]["train"])
    for name in ("accumulate", "checkpointing"):
        torch.testing.assert_close(torch.tensor(curves[name]["train"]), plain, **SAME)
    assert curves["tokens"]["train"] != curves["plain"]["train"]
    for name in ("bf16", "fp16"):
        half = torch.tensor(curves[name]["train"])
        torch.testing.assert_close(half, plain, rtol=5e-2, atol=1e-5)
        assert not torch.equal(half, plain), f"--amp {name} changed nothing"


@pytest.mark.parametrize("world", [1, 2])
def test_an_interrupted_run_goes_on_to_the_same_bytes(runs, world):
    same_bytes(runs[world] / "tuned-plain.safetensors", runs[world] / "tuned-again.safetensors")


def test_an_error_of_one_rank_is_the_error_of_all(runs):
    found = results(runs[2])["refusals"]
    assert found == results(runs[1])["refusals"]
    assert "`blocks.0.mlp` receives NaN" in found["nan"]
    assert "none of the 40 images" in found["unreadable"]
    assert "lower --lr" in found["rate"]


def test_a_rank_that_works_is_waited_for_and_one_that_hangs_is_named(tmp_path):
    ranks = start(2, tmp_path, "tests.moee.waiting_worker")
    try:
        assert all(process.wait(100) != 0 for process in ranks), "one hung for two minutes"
    finally:
        for process in ranks:
            process.kill()
    said = (tmp_path / "rank-0.log").read_text()
    assert all("waited for work" in (tmp_path / f"rank-{rank}.log").read_text() for rank in range(2))
    assert "rank 1 of 2 hangs: no sign of work for 3 s (--rank-timeout), so the others stopped" in said


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks_agree_with_one(runs, tmp_path, world):
    finish(start(world, tmp_path), tmp_path)
    check_experts(runs[1], tmp_path)
    check_curves(runs[1], tmp_path)
    same_bytes(tmp_path / "tuned-plain.safetensors", tmp_path / "tuned-again.safetensors")
