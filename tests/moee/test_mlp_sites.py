"""MLPs whose three parts are not one module: found by what follows what, proved, taken out and put back."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from moee.errors import UserError
from moee.interface.adapted import on_meta
from moee.kinds.registry import layer_records, rebuild_layers
from moee.layers.routed import routed_layers
from moee.measure.metrics import dense_params, model_cost, tokens_per_image
from moee.methods.identity import check_ffns, whole_ffn
from moee.mlps.find import find_ffns
from moee.mlps.proof import random_images
from moee.mlps.sites import mlp_module, mlp_replaced, put_mlp

SHAPE = (3, 16, 16)
DIM, HIDDEN = 8, 24


class Block(nn.Module):
    """A block of a stranger's model, with attention, norms and the three parts of its MLP side by side; tests replace `mlp`."""

    def __init__(self, act=None, dim=DIM, hidden=HIDDEN):
        super().__init__()
        self.fc2 = nn.Linear(hidden, dim)  # not in the order in which they run
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 2, batch_first=True), nn.LayerNorm(dim)
        self.fc1, self.gelu, self.drop = nn.Linear(dim, hidden), act or nn.GELU(), nn.Dropout(0.5)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y)[0]
        return x + self.mlp(self.norm2(x))

    def mlp(self, x):
        return self.fc2(self.drop(self.gelu(self.fc1(x))))


class Model(nn.Module):
    """Images [B, 3, 16, 16] in 16 tokens through blocks to 5 outputs."""

    def __init__(self, *blocks, dim=DIM):
        super().__init__()
        self.cut, self.blocks, self.head = nn.Conv2d(3, dim, 4, 4), nn.Sequential(*blocks), nn.Linear(dim, 5)

    def forward(self, images):
        return self.head(self.blocks(self.cut(images).flatten(2).mT).mean(1))


def model_of(*blocks, **kwargs):
    model = Model(*blocks, **kwargs).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5
    return model


class Inside(Block):
    """(a) the parts in a longer sequence, with a depthwise convolution and a norm, behind a LayerScale: as in ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.attn = self.norm1 = self.norm2 = None
        self.block = nn.Sequential(
            nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), nn.Flatten(2), Turned(), nn.LayerNorm(DIM),
            self.fc1, self.gelu, self.drop, self.fc2, nn.Dropout(0.5),
        )  # fmt: skip
        del self.fc1, self.gelu, self.fc2, self.drop
        self.scale = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        return x + self.scale * self.block(x.mT.unflatten(-1, (4, 4)))


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Output(nn.Module):
    """(b) the second of two modules, which adds the residual."""

    def __init__(self, down):
        super().__init__()
        self.dense, self.dropout = down, nn.Dropout(0.5)

    def forward(self, hidden, tokens):
        return self.dropout(self.dense(hidden)) + tokens


class Intermediate(nn.Module):
    def __init__(self, up, act):
        super().__init__()
        self.dense, self.act = up, act

    def forward(self, x):
        return self.act(self.dense(x))


class TwoModules(Block):
    def __init__(self):
        super().__init__()
        self.intermediate, self.output = Intermediate(self.fc1, self.gelu), Output(self.fc2)
        del self.fc1, self.gelu, self.fc2

    def forward(self, x):
        return self.output(self.intermediate(self.norm2(x)), x)


class Convolutions(Block):
    """(c) 1x1 convolutions on a map."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.norm2 = nn.Conv2d(DIM, HIDDEN, 1), nn.Conv2d(HIDDEN, DIM, 1), nn.BatchNorm2d(DIM)

    def forward(self, x):
        return x + self.mlp(self.norm2(x.mT.unflatten(-1, (4, 4)))).flatten(2).mT


class InPlace(Block):
    def __init__(self):
        super().__init__(nn.ReLU(inplace=True))


class OwnParameter(Block):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))


class Parallel(Block):
    """Attention between the two maps."""

    def forward(self, x):
        y = self.norm1(x)
        hidden = self.gelu(self.fc1(y))
        return x + self.attn(y, y, y)[0] + self.fc2(hidden)


class FeedForward(Block):
    """A norm in front of the maps, in one sequence, as many Vision Transformers have it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(self.norm2, self.fc1, self.gelu, self.drop, self.fc2)
        del self.norm2, self.fc1, self.gelu, self.drop, self.fc2

    def forward(self, x):
        return x + self.net(x)


class Kept(Block):
    """The parts in a dictionary, which is no module that runs."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"0": self.fc2, "forward_": self.fc1, "_": self.gelu})
        del self.fc1, self.gelu, self.fc2

    def mlp(self, x):
        return self.parts["0"](self.parts["_"](self.parts["forward_"](x)))


PARTS = ("blocks.0.fc1", "blocks.0.gelu", "blocks.0.fc2")
KINDS = {
    "a, inside a sequence": (Inside, ("blocks.0.block.4", "blocks.0.block.5", "blocks.0.block.7"), True),
    "a, behind a norm": (FeedForward, ("blocks.0.net.1", "blocks.0.net.2", "blocks.0.net.4"), False),
    "b, two modules": (TwoModules, ("blocks.0.intermediate.dense", "blocks.0.intermediate.act", "blocks.0.output.dense"), False),
    "c, in the block": (Block, PARTS, False),
    "c, in a dictionary": (Kept, ("blocks.0.parts.forward_", "blocks.0.parts._", "blocks.0.parts.0"), False),
    "c, convolutions": (Convolutions, PARTS, False),
    "c, in place": (InPlace, PARTS, False),
    "c, beside a parameter": (OwnParameter, PARTS, False),
    "c, around attention": (Parallel, PARTS, False),
    "c, SiLU": (lambda: Block(nn.SiLU()), PARTS, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_proved_replaced_and_put_back(kind):
    make, parts, scaled = KINDS[kind]
    model = model_of(make(), make())
    images = random_images(SHAPE, model.head.weight)
    before = model(images)
    found = find_ffns(model, shape=SHAPE)
    ffn = found.ffns[0]
    assert len(found.ffns) == 2 and not found.dense and not found.unscaled
    assert (ffn.name, *ffn.bypassed) == parts and ffn.output_name == parts[2] and (ffn.scale is not None) == scaled
    assert ffn.params == dense_params(mlp_module(model, ffn.name, ffn.bypassed))
    by_shapes = find_ffns(on_meta(model), shape=SHAPE)
    assert [(f.name, f.bypassed) for f in by_shapes.ffns] == [(f.name, f.bypassed) for f in found.ffns] and not by_shapes.dense
    check_ffns(model, found.ffns, images)
    assert torch.equal(model(images), before)
    replaced = copy.deepcopy(model)
    for each in found.ffns:
        put_mlp(replaced, each.name, whole_ffn(each), each.bypassed)
    assert torch.allclose(replaced(images), before, atol=1e-5)
    rebuilt = copy.deepcopy(model)
    rebuild_layers(rebuilt, layer_records(replaced), replaced.state_dict())
    assert torch.equal(rebuilt(images), replaced(images)) and rebuilt.state_dict().keys() == replaced.state_dict().keys()
    cost = model_cost(model, replaced, dict.fromkeys(routed_layers(replaced), [0.5, 0.5]), SHAPE)
    assert cost["dense"]["params"] == dense_params(model)
    assert tokens_per_image(model, [ffn.name], SHAPE) == {ffn.name: 16}


class Functional(Block):
    def mlp(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class UnknownFunction(Block):
    def mlp(self, x):
        return self.fc2(F.mish(self.fc1(x)))


class NormBetween(Block):
    """As it is drawn the norm's parts change nothing."""

    def __init__(self):
        super().__init__()
        self.norm = Gained()

    def mlp(self, x):
        return self.fc2(self.norm(self.gelu(self.fc1(x))))


class Gained(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1, HIDDEN))

    def forward(self, x):
        return x + 0 * self.gain * x


class Twice(Block):
    def mlp(self, x):
        return super().mlp(super().mlp(x))


class ReadsWeight(Block):
    def mlp(self, x):
        return super().mlp(x.to(self.fc1.weight.dtype))


class ReadsWidth(Block):
    def mlp(self, x):
        hidden = self.gelu(self.fc1(x))
        return self.fc2(hidden.reshape(len(x), -1, self.fc2.in_features))


class ReadsHidden(Block):
    """Nothing fails without the hidden layer: the output is another."""

    def mlp(self, x):
        hidden = self.gelu(self.fc1(x))
        return self.fc2(hidden) + hidden.mean(-1, keepdim=True)


class ClampsHidden(Block):
    """No image of the proof comes near the limit."""

    def mlp(self, x):
        return self.fc2(self.gelu(self.fc1(x)).clamp(max=100))


class ComputedWeights(Block):
    """As the older `nn.utils.weight_norm` does it."""

    def __init__(self):
        super().__init__()
        self.fc1.raw, self.fc1.weight = self.fc1.weight, None
        del self.fc1._parameters["weight"]
        self.fc1.weight = self.fc1.raw.detach().clone()


class Parametrized(Block):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.fc1)


class Gated(Block):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(DIM, HIDDEN)

    def mlp(self, x):
        return self.fc2(self.gelu(self.gate(x)) * self.fc1(x))


class OneToken(Block):
    """A gate of the channels."""

    def mlp(self, x):
        return x * self.fc2(self.gelu(self.fc1(x.mean(1, keepdim=True))))


class Hooked(Block):
    def __init__(self):
        super().__init__()
        self.gelu.register_forward_hook(lambda module, args, output: None)


TRAPS = {
    "d": (Functional, "its activation is a function, not a module: use nn.GELU()", None),
    "an unknown function": (UnknownFunction, "what lies between .* is none of gelu", "its activation is a function"),
    "an unknown module": (lambda: Block(nn.Mish()), "uses Mish; known are gelu", None),
    "parameters between": (NormBetween, "more than an activation lies between", None),
    "maps used twice": (Twice, "`blocks.0.fc1` runs 2 times in one forward pass", None),
    "a weight is read": (ReadsWeight, "something else in the model uses its parts: .*weight", None),
    "the width is read": (ReadsWidth, "something else in the model uses its parts: .*in_features", None),
    "the hidden layer is read": (ReadsHidden, "something else in the model reads its hidden layer", ""),
    "the hidden layer is clamped": (ClampsHidden, "on inputs 256 times as large, such as a clamp", ""),
    "weight norm": (Parametrized, r"`blocks.0.fc1` has a parametrisation .weight norm.: remove it with torch", None),
    "a computed weight": (ComputedWeights, "computes its weights from others", None),
    "gated": (Gated, "gated|three linear maps", None),
    "a gate of channels": (OneToken, "sees one token an image", None),
    "hooks": (Hooked, "`blocks.0.gelu` carries hooks of its own", None),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_cannot_be_taken_out_stays_dense_with_the_reason(trap):
    """`by_shapes`: the reason where the model has no memory, if it is another; empty where only values show it."""
    make, reason, by_shapes = TRAPS[trap]
    model = model_of(make(), Block())
    images = random_images(SHAPE, model.head.weight)
    before = model(images)
    for each, wanted in ((model, reason), (on_meta(model), reason if by_shapes is None else by_shapes)):
        found = find_ffns(each, shape=SHAPE)
        if each is model or wanted:
            assert [ffn.name for ffn in found.ffns] == ["blocks.1.fc1"]
        if wanted:
            (part,) = found.dense.values()
            assert re.search(wanted, part.reason), part
    assert torch.equal(model(images), before)


class Bias(nn.Module):
    """Adds a vector of the MLP's width: no scale, but a weight that could be one."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(DIM))

    def forward(self, x):
        return x + self.bias


class ScaledOutside(FeedForward):
    """A weight that could be the scale lies beside the maps, the scale itself one module further out."""

    def __init__(self):
        super().__init__()
        self.net.append(Bias())
        self.scale = nn.Parameter(torch.zeros(DIM))

    def forward(self, x):
        return x + self.scale * self.net(x)


def test_the_scale_is_looked_for_further_out_than_the_first_weight_of_its_size():
    model = model_of(ScaledOutside())
    (ffn,) = find_ffns(model, shape=SHAPE).ffns
    assert torch.equal(ffn.scale, model.blocks[0].scale)


def test_an_activation_that_blocks_share_stays():
    act = nn.GELU()
    model = model_of(Block(act), Block(act), Block())
    for each in (model, on_meta(model)):
        found = find_ffns(each, shape=SHAPE)
        assert [ffn.name for ffn in found.ffns] == ["blocks.2.fc1"]
        reasons = {name: part.reason for name, part in found.dense.items()}
        alike = "its activation `blocks.0.gelu` runs 2 times in one forward pass: give each MLP one of its own"
        assert reasons == {"blocks.0.fc1": alike, "blocks.1.fc1": alike}


def test_weights_that_two_blocks_share_stay():
    model = model_of(Block(), Block(), Block())
    model.blocks[1].fc2.weight = model.blocks[0].fc2.weight
    found = find_ffns(model, shape=SHAPE)
    assert [ffn.name for ffn in found.ffns] == ["blocks.2.fc1"]
    assert {part.reason for part in found.dense.values()} == {"shares weights with another module"}


@pytest.mark.parametrize("pattern", ["blocks.0", "blocks.0.fc1"])
def test_excluded_by_a_prefix_or_the_name(pattern):
    found = find_ffns(model_of(Block(), Block()), (pattern,), SHAPE)
    assert [ffn.name for ffn in found.ffns] == ["blocks.1.fc1"] and found.dense["blocks.0.fc1"].reason == "excluded"
    with pytest.raises(UserError, match="--exclude blocks.2 matches no MLP; this model's MLPs are blocks.0.fc1, blocks.1.fc1"):
        find_ffns(model_of(Block(), Block()), ("blocks.2",), SHAPE)


def test_a_stack_of_maps_is_taken_in_pairs():
    """Any two neighbours of maps that widen and narrow in turn would do; those that widen first are meant, and none twice."""
    widths = (DIM, HIDDEN, DIM, HIDDEN, DIM)
    maps = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip(widths, widths[1:], strict=False)]
    model = model_of(nn.Sequential(*[part for pair in maps for part in pair]))
    found = find_ffns(model, shape=SHAPE)
    assert [(f.name, f.output_name) for f in found.ffns] == [("blocks.0.0", "blocks.0.2"), ("blocks.0.4", "blocks.0.6")]
    check_ffns(model, found.ffns, random_images(SHAPE, model.head.weight))


def test_an_error_puts_the_parts_back():
    model = model_of(Block())
    (ffn,) = find_ffns(model, shape=SHAPE).ffns
    parts = [model.get_submodule(path) for path in (ffn.name, *ffn.bypassed)]
    with pytest.raises(KeyError), mlp_replaced(model, ffn.name, nn.Identity(), ffn.bypassed):
        assert not isinstance(model.blocks[0].fc2, nn.Linear)
        raise KeyError
    assert [model.get_submodule(path) for path in (ffn.name, *ffn.bypassed)] == parts


def test_a_block_under_two_names_is_replaced_under_both():
    model = model_of(Block())
    model.again = model.blocks[0]
    (ffn,) = find_ffns(model, shape=SHAPE).ffns
    put_mlp(model, ffn.name, whole_ffn(ffn), ffn.bypassed)
    assert model.again.fc1 is model.blocks[0].fc1 and isinstance(model.again.fc2, nn.Identity)


CONVNEXT = [torchvision.models.convnext.CNBlockConfig(16, 24, 1), torchvision.models.convnext.CNBlockConfig(24, None, 1)]
VISION = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8)
CONV = dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
SWINV2 = dict(embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2, image_size=32, patch_size=4)


def hf(name, **config):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, f"{name}Config")(**config)
    return getattr(transformers, f"{name}Model")(kind)


# maker, activation, split or one module, behind a LayerScale
LIBRARIES = {
    "torchvision vit": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 48), "gelu", False, False),
    "torchvision swin": (lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [2, 2]), "gelu", False, False),
    "torchvision convnext": (lambda: torchvision.models.ConvNeXt(CONVNEXT), "gelu", True, True),
    "ViT": (lambda: hf("ViT", **VISION), "gelu", None, False),
    "ViT, tanh": (lambda: hf("ViT", **VISION, hidden_act="gelu_pytorch_tanh"), "gelu_tanh", None, False),
    "ViT, the older tanh": (lambda: hf("ViT", **VISION, hidden_act="gelu_new"), "gelu_tanh", None, False),
    "ViT, quick": (lambda: hf("ViT", **VISION, hidden_act="quick_gelu"), "quick_gelu", None, False),
    "ViT, swish": (lambda: hf("ViT", **VISION, hidden_act="swish"), "silu", None, False),
    "ViT, relu": (lambda: hf("ViT", **VISION, hidden_act="relu"), "relu", None, False),
    "DeiT": (lambda: hf("DeiT", **VISION), "gelu", None, False),
    "DINOv2": (lambda: hf("Dinov2", **VISION, mlp_ratio=3), "gelu", None, True),
    "BEiT": (lambda: hf("Beit", **VISION), "gelu", None, True),
    "data2vec": (lambda: hf("Data2VecVision", **VISION), "gelu", None, True),
    "MSN": (lambda: hf("ViTMSN", **VISION), "gelu", None, False),
    "YOLOS": (lambda: hf("Yolos", **{**VISION, "image_size": [32, 32]}, num_detection_tokens=3), "gelu", None, False),
    "Swin": (lambda: hf("Swin", **SWINV2), "gelu", None, False),
    "Swin v2": (lambda: hf("Swinv2", **SWINV2), "gelu", None, False),
    "ConvNeXt": (lambda: hf("ConvNext", **CONV), "gelu", True, True),
    "CLIP": (lambda: hf("CLIPVision", **VISION), "quick_gelu", False, False),
    "SigLIP": (lambda: hf("SiglipVision", **VISION), "gelu_tanh", False, False),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_models_of_other_libraries(name):
    """`split` None: which of both depends on the version of the library."""
    make, activation, split, scaled = LIBRARIES[name]
    torch.manual_seed(0)
    model = Tensors(make()).eval()
    for parameter, value in model.named_parameters():
        if "scale" in parameter or "lambda" in parameter:
            value.data = torch.rand(value.shape) + 0.5
    found = find_ffns(model, shape=(3, 32, 32))
    assert len(found.ffns) == 2 and not found.unscaled, found.dense
    for ffn in found.ffns:
        assert ffn.activation == activation and (ffn.scale is not None) == scaled
        assert split is None or bool(ffn.bypassed) == split
    assert [f.name for f in find_ffns(on_meta(model), shape=(3, 32, 32)).ffns] == [f.name for f in found.ffns]
    check_ffns(model, found.ffns, random_images((3, 32, 32), found.ffns[0].w_up))


class Tensors(nn.Module):
    """A model that gives one tensor."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        output = self.net(images)
        return output if isinstance(output, torch.Tensor) else output[0]
