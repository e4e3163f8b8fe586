"""Gated MLPs: how they are read, and static pruning with refit against a nested-loop reference in float64."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from torch import nn
from torch.nn import functional as F
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.calibrate.refit import refit_layer
from moee.config import FinetuneConfig
from moee.errors import UserError
from moee.kinds.registry import layer_records, rebuild_layers
from moee.layers.routed import RoutedFFN, routed_layers
from moee.measure.metrics import dense_macs, dense_params, model_cost
from moee.methods.clear_moe.convert import convert
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.neurons.gated_pruning import narrower, whole
from moee.methods.recipe import Recipe, method_options
from moee.mlps.find import find_ffns
from moee.mlps.gated import GatedFFN, GatedMLP
from moee.models.model import ModelSpec, load_model
from moee.train.finetuning import finetune
from tests.conftest import extract, tiny_images, tiny_spec

DIM, HIDDEN = 12, 20
KW = dict(img_size=56, depth=2, embed_dim=48, num_heads=2, num_classes=10)
EVA, DINO = (
    ModelSpec(name=name, timm_name=name, kwargs=KW, random_seed=0)
    for name in ("eva02_tiny_patch14_224", "vit_giant_patch14_dinov2")
)


class OneMap(nn.Module):
    """A gated MLP of two maps: which half is the gate, what is done to it, and whether a module does that."""

    def __init__(self, gate_first, function, hidden=HIDDEN):
        super().__init__()
        self.gate_first = gate_first
        self.weights_in, self.weights_out = nn.Linear(DIM, 2 * hidden), nn.Linear(hidden, DIM)
        self.function = function  # a module is a part of it, anything else is not

    def forward(self, x):
        first, second = self.weights_in(x).chunk(2, -1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.weights_out(self.function(gate) * up)


class DownFirst(nn.Module):
    """Three maps that are not defined in the order in which they run; without biases."""

    def __init__(self, hidden=HIDDEN):
        super().__init__()
        self.w2, self.w3, self.w1 = (nn.Linear(*size, bias=False) for size in ((hidden, DIM), (DIM, hidden), (DIM, hidden)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class OwnFunction(nn.Module):
    """`torch.nn.GLU` gates by itself: the sigmoid of the second half."""

    def __init__(self):
        super().__init__()
        self.up, self.glu, self.down = nn.Linear(DIM, 2 * HIDDEN), nn.GLU(), nn.Linear(HIDDEN, DIM)

    def forward(self, x):
        return self.down(self.glu(self.up(x)))


class Host(nn.Module):
    """The least model that holds an MLP: patches, the MLP beside a residual path, the mean of the tokens."""

    def __init__(self, mlp, grid=False):
        super().__init__()
        self.embed, self.mlp, self.grid = nn.Conv2d(3, DIM, 8, 8), mlp, grid

    def forward(self, images):
        x = self.embed(images)
        x = x if self.grid else x.flatten(2).transpose(1, 2)
        x = x + self.mlp(x)
        return x.mean((2, 3) if self.grid else 1)


def llama():
    return LlamaMLP(LlamaConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_attention_heads=2))


def dinov2():
    return Dinov2SwiGLUFFN(Dinov2Config(hidden_size=DIM, mlp_ratio=4, use_swiglu_ffn=True))


FORMS = {
    "timm SwiGLU": (lambda: SwiGLU(DIM, HIDDEN), "silu"),
    "timm SwiGLUPacked": (lambda: SwiGLUPacked(DIM, 2 * HIDDEN), "silu"),
    "timm GluMlp, the gate last": (lambda: GluMlp(DIM, 2 * HIDDEN), "sigmoid"),
    "timm GluMlp, the gate first": (lambda: GluMlp(DIM, 2 * HIDDEN, act_layer=nn.GELU, gate_last=False), "gelu"),
    "timm GluMlp, convolutions": (lambda: GluMlp(DIM, 2 * HIDDEN, act_layer=nn.SiLU, use_conv=True), "silu"),
    "transformers Dinov2SwiGLUFFN": (dinov2, "silu"),
    "transformers LlamaMLP": (llama, "silu"),
    "chunk, gate first, no module": (lambda: OneMap(True, F.gelu), "gelu"),
    "chunk, gate last, no module": (lambda: OneMap(False, F.relu), "relu"),
    "chunk, gate last, a module": (lambda: OneMap(False, nn.GELU("tanh")), "gelu_tanh"),
    "chunk, quick_gelu": (lambda: OneMap(True, lambda x: x * torch.sigmoid(1.702 * x)), "quick_gelu"),
    "torch GLU": (OwnFunction, "sigmoid"),
    "three maps, down first": (DownFirst, "silu"),
    "three square maps, down first": (lambda: DownFirst(DIM), "silu"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_what_it_computes(form):
    make, activation = FORMS[form]
    module, grid = make().eval(), form.endswith("convolutions")
    host = Host(module, grid).eval()
    (ffn,) = find_ffns(host, shape=(3, 32, 32), gated=True).ffns
    assert isinstance(ffn, GatedMLP) and ffn.activation == activation and ffn.params == dense_params(module)
    x = torch.randn(2, DIM, 3, 3) if grid else torch.randn(2, 5, DIM)
    with torch.no_grad():
        torch.testing.assert_close(whole(ffn)(x), module(x), rtol=1e-5, atol=1e-6)
    (shadow,) = find_ffns(copy.deepcopy(host).to("meta"), shape=(3, 32, 32), gated=True).ffns
    assert (shadow.activation, shadow.w_gate.shape, shadow.hidden) == (activation, ffn.w_gate.shape, ffn.hidden)
    said = r"holds `mlp` \(gated: only --preset static and --method corp cut it\); use --preset static"
    with pytest.raises(UserError, match=said):
        find_ffns(host, shape=(3, 32, 32))


REFUSED = {
    "a norm inside": (lambda: SwiGLU(DIM, HIDDEN, norm_layer=nn.LayerNorm), "gated, and holds `norm` (LayerNorm)"),
    "a norm inside a packed one": (lambda: SwiGLUPacked(DIM, 2 * HIDDEN, norm_layer=nn.LayerNorm), "gated, and holds `norm`"),
    "a norm without weights": (
        lambda: SwiGLU(DIM, HIDDEN, norm_layer=partial(nn.LayerNorm, elementwise_affine=False)), "beside its maps"
    ),
    "another activation": (lambda: OneMap(True, nn.Mish()), "gated by Mish; known are"),
    "another activation, no module": (lambda: OneMap(True, F.mish), "computes something else than fc2(act(gate(x)) * up(x))"),
    "no gate at all": (lambda: OneMap(True, lambda x: x + 1), "computes something else than"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_gated_mlp_stays_dense_with_the_reason(case):
    make, reason = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        find_ffns(Host(make().eval()).eval(), shape=(3, 32, 32), gated=True)
    assert reason in str(refusal.value) and "choose a model with such MLPs" in str(refusal.value)


def reference(ffn, tokens, kept, ridge):
    """Outputs [N][D] of the pruned and refitted layer, by loops in float64: the means, the normal equations, the bias."""
    act = {"silu": lambda v: v / (1 + math.exp(-v)), "sigmoid": lambda v: 1 / (1 + math.exp(-v))}[ffn.activation]
    g, bg, u, bu, w, b = (t.double().tolist() for t in (ffn.w_gate, ffn.b_gate, ffn.w_up, ffn.b_up, ffn.w_down, ffn.b_down))
    rows = tokens.double().tolist()

    def hidden(x):
        return [
            act(sum(a * c for a, c in zip(g[j], x, strict=True)) + bg[j])
            * (sum(a * c for a, c in zip(u[j], x, strict=True)) + bu[j])
            for j in range(len(g))
        ]

    a = [hidden(x) for x in rows]
    n, d, k = len(rows), len(w), len(kept)
    y = [[b[o] + sum(w[o][j] * a[i][j] for j in range(len(g))) for o in range(d)] for i in range(n)]
    a_mean = [sum(a[i][j] for i in range(n)) / n for j in kept]
    y_mean = [sum(y[i][o] for i in range(n)) / n for o in range(d)]
    centred = [[a[i][j] - m for j, m in zip(kept, a_mean, strict=True)] for i in range(n)]
    gram = [[sum(c[p] * c[q] for c in centred) for q in range(k)] for p in range(k)]
    missed = [
        [y[i][o] - y_mean[o] - sum(w[o][kept[p]] * centred[i][p] for p in range(k)) for o in range(d)] for i in range(n)
    ]
    cross = [[sum(centred[i][p] * missed[i][o] for i in range(n)) for o in range(d)] for p in range(k)]
    share = ridge * sum(gram[p][p] for p in range(k)) / k
    for p in range(k):
        gram[p][p] += share
    change = torch.linalg.solve(torch.tensor(gram, dtype=torch.float64), torch.tensor(cross, dtype=torch.float64)).tolist()
    down = [[w[o][kept[p]] + change[p][o] for o in range(d)] for p in range(k)]
    bias = [y_mean[o] - sum(a_mean[p] * down[p][o] for p in range(k)) for o in range(d)]
    return torch.tensor([
        [bias[o] + sum(a[i][kept[p]] * down[p][o] for p in range(k)) for o in range(d)] for i in range(n)
    ])  # fmt: skip


@pytest.mark.parametrize("form", ["timm SwiGLU", "timm GluMlp, the gate last"])
def test_pruning_with_refit_is_the_reference(form):
    host = Host(FORMS[form][0]().eval()).eval()
    (ffn,) = find_ffns(host, shape=(3, 32, 32), gated=True).ffns
    tokens = torch.randn(60, DIM) * 2
    kept = torch.arange(0, HIDDEN, 3)
    layer = narrower(ffn, kept, ffn.activations(tokens).double().mean(0))
    assert layer.w_gate.shape == layer.w_up.shape == layer.w_down.shape == (len(kept), DIM) and layer.widths == [len(kept)]
    dense = host.mlp(tokens).detach()
    torch.testing.assert_close(layer(tokens).mean(0), dense.mean(0), rtol=1e-4, atol=1e-5)  # the dropped ones' mean is kept
    before = float((layer(tokens) - dense).detach().square().sum())
    facts = refit_layer(layer, ffn, tokens, 0.05)
    assert facts.ridge == 0.05
    torch.testing.assert_close(layer(tokens), reference(ffn, tokens, kept.tolist(), 0.05).float(), rtol=1e-4, atol=1e-5)
    assert float((layer(tokens) - dense).detach().square().sum()) < before


def static(spec, data, **options):
    """The pruned model of `spec`, and its layer reports."""
    model = load_model(spec)
    reports = extract(model, data, method_options("static", **{"refit_tokens": 2000, **options}))
    return model.eval(), reports


@pytest.fixture(scope="module")
def images():
    return tiny_images(64, 56, classes=10)


@pytest.mark.parametrize("spec", [EVA, DINO], ids=["eva02", "dinov2-g"])
@pytest.mark.parametrize("options", [
    dict(target_macs=0.75), dict(target_macs=0.75, criterion="sensitivity", allocation="model"),
    dict(keep=0.8, criterion="variance"), dict(keep=0.8, criterion="magnitude"), dict(keep=0.8, criterion="random"),
], ids=lambda o: "-".join(map(str, o.values())))  # fmt: skip
def test_budgets_and_criteria(spec, options, images):
    model, reports = static(spec, images, **options)
    layers = routed_layers(model)
    assert list(layers) == ["blocks.0.mlp", "blocks.1.mlp"] and all(isinstance(layer, GatedFFN) for layer in layers.values())
    assert [(r.status, r.experts, r.union) for r in reports] == [("routed", 1, layer.union) for layer in layers.values()]
    dense = load_model(spec)
    cost = model_cost(dense, model, {name: [1.0] for name in layers}, (3, 56, 56))
    assert cost["moee"] == {"macs": dense_macs(model, (3, 56, 56)), "params": dense_params(model)}  # counted, not derived
    share = cost["moee"]["macs"] / cost["dense"]["macs"]
    if "target_macs" in options:
        assert 0.72 < share <= 0.75
    else:
        assert share < 0.99
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(model(images.images), dense(images.images)).min() > 0.9


def mixed():
    """An ordinary ViT whose middle MLP is gated."""
    torch.manual_seed(0)
    model = load_model(tiny_spec())
    model.blocks[1].mlp = SwiGLUPacked(32, 2 * 64)
    return model.eval()


@pytest.mark.parametrize("options", [{}, dict(criterion="sensitivity", allocation="model")], ids=["share", "one price"])
def test_one_budget_for_gated_and_ordinary_mlps_of_a_model(options):
    model, data = mixed(), tiny_images(48, classes=10)
    dense = copy.deepcopy(model)
    extract(model, data, method_options("static", target_macs=0.7, refit_tokens=2000, **options))
    layers = routed_layers(model)
    assert [type(layer) for layer in layers.values()] == [RoutedFFN, GatedFFN, RoutedFFN]
    cost = model_cost(dense, model, {name: [1.0] for name in layers}, (3, 32, 32))
    share = cost["moee"]["macs"] / cost["dense"]["macs"]
    assert 0.67 < share <= 0.7
    assert all(layer.union < dense_mlp for layer, dense_mlp in zip(layers.values(), (128, 64, 128), strict=True))


def test_experts_leave_gated_mlps_dense_with_the_reason():
    data = tiny_images(48, classes=10)
    for convert_it in (
        lambda model: extract(model, data, method_options(clustering="kmeans", clusters=2, cluster_tokens=400)),
        lambda model: extract(model, data, method_options("moefication", experts=4, top_k=2)),
        lambda model: convert(model, data, ClearOptions(calibration_images=16, rank=8, residual_rank=0)),
    ):
        model = mixed()
        reports = {report.name: report for report in convert_it(model)}
        assert reports["blocks.1.mlp"].status == "dense: gated: only --preset static and --method corp cut it"
        assert isinstance(model.blocks[1].mlp, GluMlp) and len(routed_layers(model)) == 2


def test_exclude(images):
    model, reports = static(EVA, images, keep=0.7, exclude=("blocks.0",))
    assert list(routed_layers(model)) == ["blocks.1.mlp"]
    assert {r.name: r.status for r in reports} == {"blocks.1.mlp": "routed", "blocks.0.mlp": "dense: excluded"}


def test_every_neuron_kept_is_the_dense_model(images):
    model, _ = static(EVA, images, keep=1.0, compensation="none")
    with torch.no_grad():
        torch.testing.assert_close(model(images.images[:4]), load_model(EVA)(images.images[:4]), rtol=1e-4, atol=1e-5)


def test_refit_lowers_the_error_on_images_it_has_not_seen():
    """Random weights; docs/method.md has figures of a trained model."""
    train, other = tiny_images(160, 56, classes=10), tiny_images(400, 56, classes=10)
    unseen = other.images[200:]
    dense, errors = load_model(EVA), {}
    with torch.no_grad():
        expected = dense.forward_features(unseen)
        for compensation in ("none", "mean", "refit"):
            model, _ = static(EVA, train, target_macs=0.7, compensation=compensation, refit_tokens=2720)
            errors[compensation] = float((model.forward_features(unseen) - expected).square().sum())
    assert errors["refit"] < 0.8 * errors["mean"] < errors["none"], errors


def test_finetuning_trains_the_pruned_weights(images):
    model, _ = static(EVA, images, target_macs=0.7, compensation="none")
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = finetune(model, load_model(EVA), images, FinetuneConfig(epochs=3, lr=1e-3, train="experts", distil="tokens"))
    changed = {name.rpartition(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"blocks.0.mlp", "blocks.1.mlp"} and result.train_loss[-1] < result.train_loss[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, images):
    model, _ = static(EVA, images, target_macs=0.75)
    path = tmp_path_factory.mktemp("gated") / "model"
    checkpoint.save(MoeeModel(model, EVA, Recipe.of(method_options("static")), "digits"), path)
    return model, path


def test_save_and_load(saved, images):
    model, path = saved
    loaded = checkpoint.load(path)
    records = json.loads((path / "moee.json").read_text())["layers"]
    assert [(r["kind"], r["width"]) for r in records] == [("gated", layer.union) for layer in routed_layers(model).values()]
    with torch.no_grad():
        assert torch.equal(loaded.model(images.images[:4]), model(images.images[:4]))


def test_ranks_hand_each_other_the_layers(saved, images):
    model, _ = saved
    other = load_model(EVA)
    rebuild_layers(other, layer_records(model), model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(images.images[:4]), model(images.images[:4]))


BAD = {
    "kind": (dict(kind="packed"), "has a layer of the kind 'packed'; expected one of clear-moe, gated"),
    "no text": (dict(kind=["gated"]), "has a layer of the kind"),
    "width": (dict(width=7), "w_gate should have shape"),
    "more than the model has": (dict(width=4096), "manifest says dim 48, width 4096; the model has 48 and 128"),
    "dim": (dict(dim=24), "manifest says dim 24"),
    "no width": (dict(width=0), "width"),
    "activation": (dict(activation="mish"), "unknown activation 'mish'"),
    "layout": (dict(channels_first=True), "manifest says"),
    "no such layer": (dict(name="blocks.7.mlp"), "names layer blocks.7.mlp"),
    "no gated layer": (dict(name="blocks.0.attn"), "blocks.0.attn"),
    "more": (dict(gate=1), "gate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_manifests_are_refused(case, saved, tmp_path):
    changes, message = BAD[case]
    _, path = saved
    manifest = json.loads((path / "moee.json").read_text())
    manifest["layers"][0] |= changes
    for name in manifest["files"]:
        (tmp_path / name).write_bytes((path / name).read_bytes())
    (tmp_path / "moee.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as refusal:
        checkpoint.load(tmp_path)
    assert message in str(refusal.value)


def test_a_record_of_another_kind_than_the_models_mlp_is_refused(saved, images):
    model, _ = saved
    (record, *_), state = layer_records(model), model.state_dict()
    plain = dict(
        name=record["name"], activation="silu", top_k=1, experts=1, union=4, neurons=4, dim=48, load=[], channels_first=False
    )
    with pytest.raises(UserError, match="the model has a gated MLP, which has none"):
        rebuild_layers(load_model(EVA), [plain], state)
    with pytest.raises(UserError, match="says that it is gated; the model's MLP is not"):
        rebuild_layers(load_model(tiny_spec()), [{**record, "dim": 32}], state)
