"""`moee::ffn` by the plugin's kernels: the same function as the loop over experts, and nothing that the host waits for.

On the CPU the kernels run in Triton's interpreter, or are stood in for by their references; the last tests do the same on a GPU.
"""

import pytest
import torch

from moee.layers import ops
from moee.layers.routed import Experts, RoutedFFN, mask_pays
from plugins import dispatch, pytorch
from plugins.contract import ACTIVATIONS, INPUT_NAMES
from plugins.tactics import default_tactic
from tests.plugins.cases import bound, operator
from tests.stand_in import DEVICE, Placed, StandIn, autocast_enabled

# (tokens, dim, widths, union), and why
SHAPES = {
    "odd": (37, 48, (5, 33, 17, 70, 1), 70),
    "one token": (1, 32, (16, 20), 40),
    "one expert": (20, 64, (50,), 50),
    "an expert without neurons": (24, 32, (16, 0, 20), 40),
}


def arguments(shape, dtype="float32", top_k=1, activation="gelu", seed=0):
    """What `moee::ffn` takes, of a random operator."""
    inputs = operator(*shape, dtype, seed)
    return [*(inputs[name] for name in INPUT_NAMES), activation, top_k, max(shape[2]), []]


def layer_of(shape, top_k=1, dtype=torch.float32):
    inputs = operator(*shape, "float32", 3)
    x = inputs.pop("x")
    return RoutedFFN(Experts(**inputs, activation="gelu", top_k=top_k)).to(dtype), x.to(dtype)


@pytest.fixture
def provided():
    """The kernels' implementation stands for the CPU too, and counts its calls."""
    calls = []

    def counted(*given):
        calls.append(given)
        return pytorch.routed_ffn(*given)

    ops.provide("cpu", counted)
    yield calls
    ops.provide("cpu", ops.ffn_by_groups)  # as before: PyTorch takes no kernel back
    ops.WHOLE.discard("cpu")


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_compute_what_the_loop_over_experts_does(shape, top_k):
    for dtype in ("float32", "float16"):
        given = arguments(SHAPES[shape], dtype, min(top_k, len(SHAPES[shape][2])))
        given[0][0, 0] = float("nan")  # goes to expert 0 in both
        given[0] = given[0][:, None]  # leading dimensions are kept
        y, want = pytorch.routed_ffn(*given), ops.ffn_by_groups(*given)
        assert y.shape == want.shape and y.dtype == want.dtype
        good, expected = y.flatten(0, 1)[1:].double(), want.flatten(0, 1)[1:].double()
        assert y[0].isnan().all() and (good - expected).abs().le(2 * bound(expected, dtype)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_by_its_name(activation):
    given = arguments(SHAPES["one expert"], activation=activation)
    torch.testing.assert_close(pytorch.routed_ffn(*given), ops.ffn_by_groups(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("why, change", {
    "float64": lambda given: [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in given],
    "a width that is no multiple of 16":
        lambda given: [t[..., :40].clone() if n in (0, 1, 3, 5, 6) else t for n, t in enumerate(given)],
}.items())  # fmt: skip
def test_what_the_kernels_do_not_serve_goes_expert_by_expert(why, change):
    given = change(arguments(SHAPES["odd"]))
    y = pytorch.routed_ffn(*given, execute=lambda *_: pytest.fail(f"{why}: no kernel takes this"))
    assert torch.equal(y, ops.ffn_by_groups(*given))


def test_no_tokens_and_wrong_shapes():
    given = arguments(SHAPES["odd"])
    assert pytorch.routed_ffn(given[0][:0], *given[1:]).shape == (0, 48)
    with pytest.raises(ValueError, match=r"expected x \[\.\.\., 48\]"):
        pytorch.routed_ffn(torch.zeros(3, 32), *given[1:])


def test_the_rule_for_tactics_is_the_librarys():
    """`defaultTactic` of csrc/operator/tactics.cpp: the largest tile that is filled on average, but for one group."""
    for tokens, name in ((1, "group16"), (128, "group16"), (129, "tile32"), (256, "tile64"), (9999, "tile128")):
        assert default_tactic(tokens, 384, 1, 4, "float16").name == name
    assert default_tactic(64, 384, 2, 4, "float16").name == "tile32"
    assert default_tactic(128, 384, 1, 17, "float16").name == default_tactic(16, 384, 2, 4, "float16").name == "tile16"


def by_reference(spec, settings, grid, given):
    """A launch on the stand-in: the kernel's reference on the tensors' memory."""
    assert all(type(axis) is int for axis in grid)
    inner = {name: value.inner if isinstance(value, Placed) else value for name, value in given.items()}
    dispatch.launch_reference(spec, settings, grid, inner)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_host_waits_for_nothing(top_k):
    given = arguments(SHAPES["odd"], top_k=top_k)
    want = ops.ffn_by_groups(*given)
    with StandIn() as device:
        far = [t.to(DEVICE) if torch.is_tensor(t) else t for t in given]
        y = pytorch.routed_ffn(*far, execute=by_reference)
        assert not device.waits
        ops.ffn_by_groups(*far)
        assert device.waits, "the loop over experts waits, or the stand-in counts nothing"
        torch.testing.assert_close(y.cpu(), want, rtol=1e-4, atol=1e-4)


def test_a_masked_training_step_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", autocast_enabled)
    layer, x = layer_of(SHAPES["odd"])
    with StandIn() as device:
        layer, x = layer.to(DEVICE), x.to(DEVICE)
        with torch.no_grad():
            chosen = layer.routes(x)
        device.waits.clear()
        layer._masked(x.requires_grad_(), chosen).sum().backward()
        assert layer.w_up.grad is not None and not device.waits
        layer._grouped(x, chosen).sum().backward()
        assert device.waits


def test_when_a_mask_pays():
    assert not mask_pays("cpu", False, tokens=1, share=1) and mask_pays("cpu", True, tokens=128, share=0.01)
    assert not mask_pays("cpu", True, tokens=129, share=1)
    for wanted in (False, True):  # on a GPU the rule decides, however many tokens there are
        assert mask_pays("cuda", wanted, tokens=1e6, share=0.5) and not mask_pays("cuda", wanted, tokens=1, share=0.49)


def test_layers_take_it_where_no_gradient_is_needed(provided):
    layer, x = layer_of(SHAPES["odd"])
    with_gradient = layer(x)
    assert not provided and with_gradient.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(layer(x), with_gradient, rtol=1e-4, atol=1e-4)
        assert len(provided) == 1
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), with_gradient, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert [given[0].dtype for given in provided] == [torch.float32, torch.float32, torch.bfloat16]
    layer.requires_grad_(False)
    assert not layer(x).requires_grad and len(provided) == 4


def test_registration_is_for_cuda_alone():
    pytorch.register()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("moee::ffn", "CUDA") and "cpu" not in ops.WHOLE


@pytest.fixture
def on_gpu():
    pytorch.register()
    return torch.device("cuda", 0)


BATCH = (8 * 197, 384, (700, 500, 768, 20), 1400)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_on_a_gpu(on_gpu, dtype):
    layer, x = layer_of(BATCH, dtype=dtype)
    layer, x = layer.to(on_gpu), x.to(on_gpu)
    with torch.no_grad():
        layer(x)  # Triton compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        chosen = layer.routes(x)
        want = ops.experts(x, chosen, *layer.store)
    name = str(dtype).removeprefix("torch.")
    near = (y.double() - want.double()).abs().le(4 * bound(want.double(), name)).all(1)
    assert near.float().mean() > 0.99, "all but near ties go to the same expert"


@pytest.mark.gpu
def test_graphs_and_compilation_on_a_gpu(on_gpu):
    layer, x = layer_of(BATCH, dtype=torch.float16)
    layer, x = layer.to(on_gpu), x.to(on_gpu)
    others = [torch.randn_like(x) for _ in range(3)]
    with torch.no_grad():
        wanted = [layer(other) for other in others]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
        for other, want in zip(others, wanted, strict=True):
            x.copy_(other)
            graph.replay()
            assert torch.equal(y, want)
            assert torch.equal(compiled(other.clone()), want)


@pytest.mark.gpu
def test_a_masked_training_step_on_a_gpu(on_gpu):
    layer, x = layer_of(BATCH)
    layer, x = layer.to(on_gpu), x.to(on_gpu).requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer._masked(x, layer.routes(x)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
