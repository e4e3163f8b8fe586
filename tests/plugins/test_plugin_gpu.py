"""The compiled plugin on a real GPU, without TensorRT: numerics, CUDA-graph capture, latency of every tactic.

The same calls run on the CPU against the test-double driver in test_plugin_enqueue.py.
"""

from functools import cache

import pytest
import torch

from plugins.aot.build import build_kernels
from plugins.library.build import build_plugin
from plugins.reference import moee_ffn
from plugins.tactics import by_id
from plugins.workspace import TORCH_DTYPES, Sizes
from tests.plugins import built
from tests.plugins.build_doubles import build_harness
from tests.plugins.harness import Harness, case_of, make_inputs
from tests.plugins.test_plugin_enqueue import TOLERANCE

pytestmark = pytest.mark.gpu


@cache
def harness() -> Harness:
    major, minor = torch.cuda.get_device_capability()
    folder = built.ROOT / f"gpu-{major}{minor}"
    build_kernels(folder / "kernels", (10 * major + minor,))
    torch.zeros(1, device="cuda")  # makes the context current, as TensorRT does
    return Harness(build_harness(folder), build_plugin(folder / "plugin", folder / "kernels"))


class Layer:
    """One attached layer with its inputs on the GPU."""

    def __init__(self, dtype: str, tokens: int, widths: list[int], dim: int, union: int, top_k: int = 1):
        self.sizes = Sizes(tokens, dim, len(widths), union, max(widths), top_k)
        self.host = make_inputs(self.sizes, TORCH_DTYPES[dtype], 7, widths)
        self.inputs = {name: value.cuda() for name, value in self.host.items()}
        self.case = case_of((tokens,), self.sizes, sum(widths), dtype)
        layer = harness().create(0, top_k, max(widths), [1] * len(widths))
        harness().configure(layer, self.case)
        self.tactics = harness().tactics(layer)
        runtime = harness().recreate(layer)
        self.attached = harness().attach(runtime)
        self.memory = torch.full((harness().workspace(layer, self.case),), 0xFF, dtype=torch.uint8, device="cuda")
        self.y = torch.full_like(self.inputs["x"], float("nan"))
        harness().destroy(layer, runtime)

    def run(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        code = harness().enqueue(self.attached, self.case, self.inputs, self.y, self.memory, stream)
        assert code == 0, harness().log()


def milliseconds(run, repeats: int = 50) -> list[float]:
    """Sorted times of single calls, after a warm-up."""
    times = []
    for i in range(repeats + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(end))
    return sorted(times)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_tactic_matches_float64(dtype, top_k):
    layer = Layer(dtype, 57, [37, 5, 80, 1, 64, 33, 17], 96, 101, top_k)
    want = moee_ffn(layer.host, activation=0, top_k=top_k)
    for tactic in layer.tactics:
        layer.y.fill_(float("nan"))
        harness().set_tactic(layer.attached, tactic)
        layer.run()
        error = (layer.y.double().cpu() - want).abs().max().item()
        # Four times the rounding of the CPU's references: tensor cores add in another order.
        assert error <= 4 * TOLERANCE[dtype] * want.abs().max().item(), by_id(tactic).name


def test_enqueue_is_captured_in_a_cuda_graph_and_replays():
    layer = Layer("float16", 197, [192] * 8, 192, 768)
    for tactic in layer.tactics:
        harness().set_tactic(layer.attached, tactic)
        layer.run()
        torch.cuda.synchronize()
        first = layer.y.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer.run()
        for _ in range(3):  # counters must start from zero in each replay
            layer.y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(layer.y, first), by_id(tactic).name


def test_latency_of_each_tactic_against_the_dense_ffn(capsys):
    """DeiT-S, batch 8, float16, half the MACs. Prints medians; the best tactic must beat the dense FFN."""
    layer = Layer("float16", 8 * 197, [768] * 16, 384, 1536)
    up, down = (torch.randn(shape, device="cuda").half() for shape in ((1536, 384), (384, 1536)))

    def dense() -> None:
        h = torch.nn.functional.gelu(torch.nn.functional.linear(layer.inputs["x"], up))
        torch.nn.functional.linear(h, down)

    medians = {"dense": milliseconds(dense)[25]}
    for tactic in layer.tactics:
        harness().set_tactic(layer.attached, tactic)
        medians[by_id(tactic).name] = milliseconds(layer.run)[25]
    with capsys.disabled():
        print({name: round(value, 4) for name, value in medians.items()})
    assert min(v for n, v in medians.items() if n != "dense") < medians["dense"]
