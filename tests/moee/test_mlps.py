"""MLPs are what they compute: proofs that refuse, structures by any name, shared modules, missing biases."""

import copy
import logging

import pytest
import torch
from torch import nn

from moee.errors import UserError
from moee.interface.adapted import on_meta
from moee.layers.routed import routed_layers
from moee.measure.metrics import dense_params, model_cost
from moee.methods.identity import check_ffns
from moee.mlps.find import find_ffns
from moee.mlps.proof import CHOSEN, disagreement, random_images
from moee.mlps.structure import read_mlp
from moee.models.ffn import FFN
from moee.models.model import ModelSpec, load_model, names_of, replace_module
from tests.conftest import tiny_spec

SHAPE = (3, 32, 32)


class Plain(nn.Module):
    """An MLP whose parts have names of their own; `forward` is what tests replace."""

    def __init__(self, dim=32, hidden=64, act=None):
        super().__init__()
        self.widen, self.bend, self.narrow = nn.Linear(dim, hidden), act or nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.narrow(self.bend(self.widen(x)))


class ScaledInside(Plain):
    def forward(self, x):
        return 1.001 * super().forward(x)


class Shortcut(Plain):
    def forward(self, x):
        return x + super().forward(x)


class Clamped(Plain):
    """No image of the proof comes near the limit."""

    def forward(self, x):
        return self.narrow(self.bend(self.widen(x).clamp(-100, 100)))


class FailsOnLarge(Plain):
    def forward(self, x):
        if x.abs().max() > 100:
            raise ValueError("too large")
        return super().forward(x)


class ShiftedTokens(Plain):
    def forward(self, x):
        return super().forward(x.roll(1, -2))


class Masked(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


class MaskedMaps(Plain):
    def __init__(self):
        super().__init__()
        self.widen = Masked(32, 64)


class TwoArguments(nn.Module):
    """A block's sub-layer that calls its MLP with a size beside the tokens."""

    def __init__(self):
        super().__init__()
        self.inner = Sized()

    def forward(self, x):
        return self.inner(x, (1, x.shape[1]))


class Sized(Plain):
    def forward(self, x, size):
        return super().forward(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Plain()

    def forward(self, x):
        return self.inner(self.inner(x))


class Factors(nn.Module):
    """As peft leaves a map of which the factors are not merged."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(32, 64)
        self.lora_A, self.lora_B = nn.Linear(32, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Adapted(Plain):
    def __init__(self):
        super().__init__()
        self.widen = Factors()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Plain()

    def forward(self, x):
        return x


class Mixing(nn.Module):
    """Tokens of all images side by side: [N, B, D]."""

    def __init__(self):
        super().__init__()
        self.inner = Plain()

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def with_mlp(mlp, at=1):
    model = load_model(tiny_spec())
    model.blocks[at].mlp = mlp
    return model.eval()


@pytest.mark.parametrize(
    ("mlp", "name", "reason"),
    [
        (ScaledInside, "blocks.1.mlp", "computes something else"),
        (Shortcut, "blocks.1.mlp", "computes something else"),
        (ShiftedTokens, "blocks.1.mlp", "computes something else"),
        (Clamped, "blocks.1.mlp", "on inputs 256 times as large, such as a clamp"),
        (FailsOnLarge, "blocks.1.mlp", "does not run on inputs 256 times as large: too large"),
        (MaskedMaps, "blocks.1.mlp", "`widen` is Masked, no plain linear map"),
        (lambda: Plain(act=nn.Mish()), "blocks.1.mlp", "uses Mish; known are gelu"),
        (lambda: Plain(act=nn.PReLU()), "blocks.1.mlp", "holds `bend` (PReLU)"),
        (TwoArguments, "blocks.1.mlp.inner", "called with 2 arguments"),
        (Twice, "blocks.1.mlp.inner", "runs 2 times in one forward pass"),
        (Adapted, "blocks.1.mlp", "`widen` has factors of LoRA beside its weight: merge them first"),
        (Unused, "blocks.1.mlp.inner", "takes no part in a forward pass"),
        (Mixing, "blocks.1.mlp.inner", "do not lie image by image"),
    ],
)
def test_what_is_no_mlp_stays_dense_with_the_reason(mlp, name, reason):
    found = find_ffns(with_mlp(mlp()))
    assert [ffn.name for ffn in found.ffns] == ["blocks.0.mlp", "blocks.2.mlp"]
    assert list(found.dense) == [name] and reason in found.dense[name].reason
    assert found.dense[name].hidden == 64


class Picking(nn.Module):
    """A mixture of experts that runs each on the tokens it gets; `by_image`: all tokens of an image go to one."""

    def __init__(self, by_image=False):
        super().__init__()
        torch.manual_seed(1)
        self.gate, self.experts, self.by_image = nn.Linear(32, 4), nn.ModuleList(Plain() for _ in range(4)), by_image

    def forward(self, x):
        if self.by_image:
            return torch.stack([self.experts[int(e)](image) for e, image in zip(self.gate(x.mean(1)).argmax(-1), x, strict=True)])
        flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        experts = self.gate(flat).argmax(-1)
        for e, expert in enumerate(self.experts):
            out[experts == e] = expert(flat[experts == e])
        return out.unflatten(0, x.shape[:2])


@pytest.mark.parametrize("by_image", [False, True])
def test_experts_that_get_picked_tokens_stay_dense_since_they_are_picked(by_image):
    found = find_ffns(with_mlp(Picking(by_image)))
    reasons = {part.reason for part in found.dense.values()}
    assert [ffn.name for ffn in found.ffns] == ["blocks.0.mlp", "blocks.2.mlp"] and len(found.dense) == 4
    assert CHOSEN in reasons <= {CHOSEN, "takes no part in a forward pass"}
    with pytest.raises(UserError, match="VisionTransformer cannot be read by its shapes: what it computes for an image depends"):
        find_ffns(on_meta(with_mlp(Picking(by_image))))


def test_an_mlp_that_fails_on_large_inputs_hides_no_other():
    model = with_mlp(FailsOnLarge())
    model.blocks[2].mlp = Clamped()
    found = find_ffns(model)
    assert [ffn.name for ffn in found.ffns] == ["blocks.0.mlp"] and "clamp" in found.dense["blocks.2.mlp"].reason


def test_a_method_replaced_on_one_instance_is_noticed():
    model = with_mlp(Plain())
    model.blocks[1].mlp.forward = lambda x: x * 0
    assert "computes something else" in find_ffns(model).dense["blocks.1.mlp"].reason


@pytest.mark.parametrize(
    "mlp",
    [
        Plain,
        lambda: nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Dropout(0.5), nn.Linear(64, 32), nn.Dropout(0.5)),
        lambda: nn.Sequential(nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(inplace=True)), nn.Linear(64, 32)),
    ],
)
def test_names_and_classes_do_not_matter(mlp):
    model = with_mlp(mlp())
    found = find_ffns(model)
    assert [ffn.name for ffn in found.ffns] == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"] and not found.dense
    assert found.ffns[1].params == dense_params(model.blocks[1].mlp)
    check_ffns(model, found.ffns, random_images(SHAPE, found.ffns[0].w_up))


def test_weights_that_two_modules_share_stay_dense():
    model = with_mlp(Plain())
    other = Plain()
    other.widen.weight = model.blocks[1].mlp.widen.weight
    model.blocks[2].mlp = other
    dense = find_ffns(model).dense
    assert {name: part.reason for name, part in dense.items()} == dict.fromkeys(
        ("blocks.1.mlp", "blocks.2.mlp"), "shares weights with another module"
    )


def test_a_module_under_two_names_is_replaced_under_both():
    model = load_model(tiny_spec())
    model.again = model.blocks[1].mlp
    found = find_ffns(model)
    assert len(found.ffns) == 3
    assert names_of(model, model.again) == ["blocks.1.mlp", "again"]
    new = Plain()
    replace_module(model, "blocks.1.mlp", new)
    assert model.again is new and model.blocks[1].mlp is new


def _keep_output(model):
    kept = {}
    model.blocks[1].mlp.register_forward_hook(lambda module, args, output: kept.update(now=output))
    model.norm.register_forward_hook(lambda module, args, output: output + kept["now"])


def _keep_input(model):
    model.blocks[1].mlp.register_forward_pre_hook(lambda module, args: None)


def _keep_part(model):
    model.blocks[1].mlp.act.register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize("hook", [_keep_output, _keep_input, _keep_part])
def test_an_mlp_that_a_hook_looks_at_stays_dense(hook):
    """Its replacement has no hook, and what the hook kept for another part of the model would be of an earlier run."""
    model = load_model(tiny_spec())
    hook(model)
    found = find_ffns(model)
    assert [ffn.name for ffn in found.ffns] == ["blocks.0.mlp", "blocks.2.mlp"]
    assert found.dense["blocks.1.mlp"].reason == "has a forward hook, which would no longer run"


def test_nan_is_not_the_mlps_fault():
    model = load_model(tiny_spec())
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="`blocks.1.mlp` gives NaN or infinite activations"):
        find_ffns(model)


def test_nothing_left_to_cut_is_one_sentence():
    said = r"no fc1-act-fc2 MLP .*`blocks.0.mlp`, `blocks.1.mlp` and 1 more \(excluded\); leave out --exclude"
    with pytest.raises(UserError, match=said):
        find_ffns(load_model(tiny_spec()), ("blocks",))


def test_a_model_that_does_not_run_says_so():
    with pytest.raises(UserError, match="VisionTransformer does not run on images of 3 x 48 x 48"):
        find_ffns(load_model(tiny_spec()), shape=(3, 48, 48))


def test_reading_by_name():
    model = load_model(tiny_spec())
    assert read_mlp(model, "blocks.0.mlp").hidden == 128
    for name, message in (("blocks.0.attn", "no plain MLP"), ("blocks.9.mlp", "has no module")):
        with pytest.raises(UserError, match=message):
            read_mlp(model, name)


def test_mlps_without_biases_are_counted_exactly():
    dense = load_model(tiny_spec())
    for block in dense.blocks:
        block.mlp.fc1.bias = block.mlp.fc2.bias = None
    model, total = copy.deepcopy(dense), dense_params(dense)
    from moee.methods.identity import whole_ffn

    for ffn in find_ffns(dense).ffns:
        assert ffn.params == 2 * 32 * 128
        replace_module(model, ffn.name, whole_ffn(ffn))
    layers = routed_layers(model)
    cost = model_cost(dense, model, dict.fromkeys(layers, [0.5, 0.5]), SHAPE)
    assert cost["dense"]["params"] == total
    assert cost["moee"]["params"] == sum(p.numel() for p in model.parameters()) + 3 * 2  # each router's biases are a buffer


def test_a_map_that_two_mlps_share_is_counted_once_and_then_for_both():
    """Replaced, each has its own; what the dense model holds once is not taken away twice."""
    dense = load_model(tiny_spec())
    dense.blocks[1].mlp.fc1 = dense.blocks[0].mlp.fc1
    model = copy.deepcopy(dense)
    from moee.methods.identity import whole_ffn

    for ffn in find_ffns(dense).ffns:
        replace_module(model, ffn.name, whole_ffn(ffn))
    cost = model_cost(dense, model, dict.fromkeys(routed_layers(model), [0.5, 0.5]), SHAPE)
    assert cost["dense"]["params"] == sum(p.numel() for p in dense.parameters())
    assert cost["moee"]["params"] == sum(p.numel() for p in model.parameters()) + 3 * 2


@pytest.mark.parametrize("attribute", ["gamma_2", "weird_name"])
def test_layer_scale_by_any_name(attribute):
    """A bare parameter of the block that its forward multiplies the MLP's output with; a decoy of the same shape is not taken."""

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
            self.decoy = nn.Parameter(torch.linspace(1, 2, 32))
            setattr(self, attribute, nn.Parameter(torch.linspace(-1e-5, 2, 32)))
            self.decoy_2 = nn.Parameter(torch.linspace(2, 3, 32))

        def forward(self, x, *args, **kwargs):
            x = x + self.decoy * self.attn(self.norm1(x))
            return x + getattr(self, attribute) * self.mlp(self.norm2(x)) + 0 * self.decoy_2

    model = load_model(tiny_spec())
    model.blocks[1] = Block(model.blocks[1])
    found = find_ffns(model)
    assert torch.equal(found.ffns[1].scale, getattr(model.blocks[1], attribute).detach()) and not found.unscaled
    assert found.ffns[0].scale is None


FACTORS = {
    "a buffer": lambda of: of.register_buffer("kept", of.drawn) or (lambda: of.kept),
    "one of a list": lambda of: setattr(of, "all", nn.ParameterList([torch.ones(32), of.drawn])) or (lambda: of.all[1]),
    "of a dictionary": lambda of: setattr(of, "all", nn.ParameterDict({"attn": torch.ones(32), "mlp": of.drawn}))
    or (lambda: of.all["mlp"]),
    "tanh of a parameter": lambda of: setattr(of, "gate", nn.Parameter(of.drawn)) or (lambda: of.gate.tanh()),
    "two parameters": lambda of: setattr(of, "one", nn.Parameter(of.drawn)) or setattr(of, "two", nn.Parameter(of.drawn + 3))
    or (lambda: of.one * of.two),
    "one number": lambda of: setattr(of, "alpha", nn.Parameter(torch.tensor(-0.3))) or (lambda: of.alpha.expand(32)),
    "tiny": lambda of: of.register_buffer("kept", 1e-6 * of.drawn) or (lambda: of.kept),
}  # fmt: skip


class Factored(nn.Module):
    """A block that adds `bent` of its MLP's output times a factor."""

    def __init__(self, block, make, bent=lambda y, x: y):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp, self.bent = block.norm1, block.attn, block.norm2, block.mlp, bent
        self.drawn = torch.linspace(-1, 2, 32)
        self.factor = make(self)

    def forward(self, x, *args, **kwargs):
        x = x + self.attn(self.norm1(x))
        return x + self.bent(self.factor() * self.mlp(self.norm2(x)), x)


@pytest.mark.parametrize("what", FACTORS)
def test_a_factor_that_is_no_weight_of_the_block_is_measured(what):
    model = load_model(tiny_spec())
    model.blocks[1] = Factored(model.blocks[1], FACTORS[what])
    found, factor = find_ffns(model), model.blocks[1].factor().detach()
    assert not found.unscaled and found.ffns[0].scale is None
    torch.testing.assert_close(found.ffns[1].scale, factor, rtol=1e-5, atol=1e-5 * float(factor.abs().max()))


@pytest.mark.parametrize("bent", [
    lambda y, x: 1e-4 * torch.tanh(y), lambda y, x: y * torch.sigmoid(x), lambda y, x: y * torch.sigmoid(x.mean(1, keepdim=True)),
    lambda y, x: y.roll(1, 1), lambda y, x: nn.functional.layer_norm(y, (32,)), lambda y, x: 0 * y,
], ids=["bent", "gated by its token", "gated by its image", "of another token", "normed", "not used"])  # fmt: skip
def test_what_is_no_factor_is_none(bent):
    model = load_model(tiny_spec())
    model.blocks[1] = Factored(model.blocks[1], FACTORS["one number"], bent)
    assert find_ffns(model).ffns[1].scale is None


def test_a_scale_that_cannot_be_proved_is_said(tmp_path, caplog):
    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.mlp = block, block.mlp
            self.gamma = nn.Parameter(torch.full((32,), 0.5))

        def forward(self, x, *args, **kwargs):
            return torch.tanh(self.gamma * self.mlp(x)) + x

    from moee.methods.recipe import Recipe, method_options
    from moee.stages.session import Session

    session = Session(tiny_spec(), "digits")
    session.dense.blocks[1] = Block(session.dense.blocks[1])
    found = find_ffns(session.dense)
    name = found.ffns[1].name
    assert found.unscaled == [name] and found.ffns[1].scale is None
    with caplog.at_level(logging.WARNING, "moee"):
        session.prove(Recipe.of(method_options()))
    assert f"what scales the output of `{name}` could not be proved" in caplog.text


def test_attention_pooling_is_counted():
    from moee.measure.metrics import dense_macs

    spec = ModelSpec(name="p", timm_name="test_vit3", kwargs=dict(img_size=64), random_seed=0)
    assert dense_macs(load_model(spec), (3, 64, 64)) > 0


@pytest.mark.parametrize(("dim", "hidden"), [(32, 128), (384, 1536), (1024, 4096)])
@pytest.mark.parametrize("channels_first", [False, True])
def test_the_bound_of_the_proof_holds_a_thousandth_at_any_width(dim, hidden, channels_first):
    """What float32 sums differ by is far below it, a factor of 1.001 above."""
    torch.manual_seed(0)
    kind = (lambda *sizes: nn.Conv2d(*sizes, 1)) if channels_first else nn.Linear
    up, down = kind(dim, hidden), kind(hidden, dim)
    x = torch.randn(3, dim, 7, 7) if channels_first else torch.randn(3, 50, dim)
    ffn = FFN("mlp", "gelu", up.weight.flatten(1), up.bias, down.weight.flatten(1), down.bias, None, channels_first)
    with torch.no_grad():
        output = down(nn.functional.gelu(up(x)))
        assert disagreement(ffn, x, output) < 0.5
        assert disagreement(ffn, x, output * 1.001) > 1
        assert disagreement(ffn, x, output * torch.nan) == torch.inf


@pytest.mark.parametrize(("dim", "hidden"), [(8, 32), (32, 128)])
def test_the_bound_of_the_proof_knows_of_biases_that_outweigh_the_products(dim, hidden):
    """A bias is part of every partial sum: ConvNeXt's narrow first stage came to 1.3 of a bound that did not say so."""
    torch.manual_seed(0)
    up, down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
    x = torch.randn(20, 200, dim)
    with torch.no_grad():
        for part in (up, down):
            part.weight.mul_(0.05)
            part.bias.normal_()
        ffn = FFN("mlp", "gelu", up.weight, up.bias, down.weight, down.bias, None, False)
        hidden_values = nn.functional.gelu(up(x))
        one_by_one = down.bias.expand(20, 200, dim)
        for neuron in range(hidden):
            one_by_one = one_by_one + hidden_values[..., neuron, None] * down.weight[:, neuron]
        assert disagreement(ffn, x, one_by_one) < 1
        assert disagreement(ffn, x, one_by_one + 1e-4) > 1
