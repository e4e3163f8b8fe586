"""Where the work of an extraction is done: on a stand-in for a device it gives the CPU's results to the bit and leaves nothing
behind; the same runs on a GPU."""

import copy
from contextlib import ExitStack

import pytest
import timm.layers
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from moee.calibrate.in_step import Pass
from moee.config import FinetuneConfig
from moee.layers.routed import RoutedFFN
from moee.measure.evaluation import run
from moee.methods.clear_moe.convert import convert as convert_clear
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.heads.narrowing import narrow
from moee.methods.recipe import method_options
from moee.mlps.gated import GatedFFN
from moee.models.model import ModelSpec, load_model
from moee.parallel.group import Group
from moee.train.finetuning import finetune
from tests.conftest import extract, tiny_images, tiny_spec
from tests.stand_in import DEVICE, Placed, StandIn, autocast_enabled

KMEANS = dict(clustering="kmeans", clusters=3, cluster_tokens=300)
CONFIGS = {
    "hdbscan": dict(clustering="hdbscan", components=4, min_cluster_size=0.05, cluster_tokens=200),
    "kmeans, sensitivity": dict(KMEANS, criterion="sensitivity", allocation="model", target_macs=0.8),
    "kmeans, cluster statistics": dict(KMEANS, statistics="cluster", routing="euclidean", refit_lambda=0.1),
    "static": dict(clustering="none", criterion="sensitivity", allocation="model", target_macs=0.7),
    "moefication": dict(method="moefication", experts=4, top_k=2, split="coactivation", selector="router", compensation="mean"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_form_of_attention():
    """The fused form is another one on every device."""
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(bool(before))


class OneThread:
    """The pool of an extraction; the stand-in is one thread's."""

    def __init__(self, workers: int):
        pass

    map = staticmethod(map)

    def shutdown(self, **kwargs) -> None:
        pass


@pytest.fixture(autouse=True)
def in_this_thread(monkeypatch):
    monkeypatch.setattr("moee.methods.convert.ThreadPoolExecutor", OneThread)
    start, run = Pass.start, Pass.run

    def started(here):  # a pass is a thread of its own
        here.modes = _get_current_dispatch_mode_stack()
        start(here)

    def among_modes(here):
        with ExitStack() as stack:
            for mode in here.modes:
                stack.enter_context(mode)
            run(here)

    monkeypatch.setattr(Pass, "start", started)
    monkeypatch.setattr(Pass, "run", among_modes)
    monkeypatch.setattr(torch, "is_autocast_enabled", autocast_enabled)


SWIN = dict(img_size=64, embed_dim=16, depths=(2, 1), num_heads=(2, 2), window_size=4, num_classes=10)
EVA = dict(img_size=56, embed_dim=48, depth=2, num_heads=2, num_classes=10)


def same(a, b) -> None:
    """Two models with equal tensors, all of the second on the CPU."""
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, value in second.items():
        assert not isinstance(value, Placed) and value.device.type == "cpu", f"{name} was left on {value.device}"
        assert torch.equal(first[name], value), name


@pytest.mark.parametrize("which", CONFIGS)
def test_an_extraction_on_a_device_is_the_one_on_the_cpu(which):
    config, model, data = method_options(**CONFIGS[which]), load_model(tiny_spec()), tiny_images()
    far = copy.deepcopy(model)
    expected = extract(model, data, config)
    with StandIn() as device:
        reports = extract(far, data, config, group=Group(device=DEVICE))
    assert [r.widths for r in reports] == [r.widths for r in expected]
    same(model, far)
    assert device.counts["aten.addmm.default"] > 30


@pytest.mark.gpu
@pytest.mark.parametrize("which", CONFIGS)
def test_an_extraction_on_a_gpu_gives_the_same_model_as_far_as_rounding_lets_it(which):
    config, model, data = method_options(**CONFIGS[which]), load_model(tiny_spec()), tiny_images()
    far = copy.deepcopy(model)
    extract(model, data, config)
    extract(far, data, config, group=Group(device=torch.device("cuda", 0)))
    assert {tensor.device.type for tensor in far.state_dict().values()} == {"cpu"}
    alike = torch.nn.functional.cosine_similarity(run(model, data).features, run(far, data).features)
    assert float(alike.min()) > 0.98


@pytest.mark.gpu
def test_heads_and_clear_moe_on_a_gpu():
    gpu, data = torch.device("cuda", 0), tiny_images()
    wide = load_model(tiny_spec(embed_dim=64))
    far, low_rank = copy.deepcopy(wide), copy.deepcopy(wide)
    assert narrow(far, data, (3, 32, 32), 0.75, group=Group(device=gpu))
    convert_clear(low_rank, data, ClearOptions(experts=2, target_macs=0.7), device=gpu)
    for model in (far, low_rank):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
        alike = torch.nn.functional.cosine_similarity(run(wide, data).features, run(model, data).features)
        assert float(alike.mean()) > 0.9


def test_a_hierarchical_model_is_refitted_on_a_device():
    """Its later layers take the forward pass up where the earlier ones left it."""
    spec = ModelSpec(name="swin", timm_name="swin_tiny_patch4_window7_224", kwargs=SWIN, random_seed=0)
    model, data = load_model(spec), tiny_images(size=64)
    config = method_options(**KMEANS, criterion="sensitivity", allocation="model", target_macs=0.8, refit_tokens=600)
    far = copy.deepcopy(model)
    extract(model, data, config)
    with StandIn():
        extract(far, data, config, group=Group(device=DEVICE))
    same(model, far)


def test_gated_mlps_are_pruned_on_a_device():
    spec = ModelSpec(name="eva", timm_name="eva02_tiny_patch14_224", kwargs=EVA, random_seed=0)
    model, data, config = load_model(spec), tiny_images(size=56), method_options("static", target_macs=0.7)
    far = copy.deepcopy(model)
    extract(model, data, config)
    with StandIn():
        extract(far, data, config, group=Group(device=DEVICE))
    same(model, far)
    assert any(isinstance(module, GatedFFN) for module in far.modules())


def test_heads_are_narrowed_on_a_device():
    model, data = load_model(tiny_spec(embed_dim=64)), tiny_images()
    far = copy.deepcopy(model)
    with sdpa_kernel(SDPBackend.MATH):
        widths = narrow(model, data, (3, 32, 32), 0.75)
    with StandIn() as device, sdpa_kernel(SDPBackend.MATH):
        assert narrow(far, data, (3, 32, 32), 0.75, group=Group(device=DEVICE)) == widths
    same(model, far)
    assert device.counts["aten._linalg_eigh.default"] and widths


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_clear_moe_runs_the_model_on_a_device(router):
    model, data = load_model(tiny_spec()), tiny_images()
    config = ClearOptions(experts=2, target_macs=0.7, router=router)
    far = copy.deepcopy(model)
    expected = convert_clear(model, data, config)
    with StandIn() as device:
        assert convert_clear(far, data, config, device=DEVICE) == expected
    same(model, far)
    assert device.counts["aten.addmm.default"] > 30


def test_evaluation_and_tuning_on_a_device(tiny_moee):
    model, dense, data, _, _ = tiny_moee
    config, far = FinetuneConfig(epochs=2, batch_size=8), copy.deepcopy(model)
    with StandIn() as device:
        outputs = run(far, data, group=Group(device=DEVICE))
        tuned = finetune(far, dense, data, config, group=Group(device=DEVICE))
    here = run(model, data)
    assert torch.equal(outputs.features, here.features) and outputs.shares == here.shares
    assert tuned == finetune(model, dense, data, config)
    same(model, far)
    assert device.counts["moee.experts_backward.default"] > 4
    assert any(isinstance(module, RoutedFFN) for module in far.modules())


def test_the_stand_in_sees_what_is_left_behind():
    with StandIn():
        there, here = torch.ones(2, 2, device=DEVICE), torch.ones(2, 2)
        for wrong in (
            lambda: there @ here, lambda: torch.cat([there, here]), lambda: here.add_(there), lambda: here[there.long()]
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                wrong()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device=DEVICE, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert isinstance(there[here.long()], Placed) and (there + torch.tensor(1.0)).tolist() == [[2.0, 2.0], [2.0, 2.0]]
        assert torch.equal(there.cpu(), here)
