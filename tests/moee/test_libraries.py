"""Models of other libraries behind timm's interface: what is found out about them, and that they serve every step."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from torch import nn

import moee
from moee.artifacts.answers import check_answers
from moee.errors import UserError
from moee.interface.adapted import AdaptedModel, has_feature_map, on_meta, run_model
from moee.interface.spec import InputConfig
from moee.libraries.adapt import _say_classes, adapt, library_of
from moee.mlps.attention import find_attentions
from moee.mlps.structure import read_mlp
from moee.progress import silent

transformers = pytest.importorskip("transformers")
SMALL = InputConfig(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
HF = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
SWIN = dict(embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2, image_size=32, patch_size=4)


def of(kind: str, **config) -> nn.Module:
    """A tiny model of transformers."""
    family = kind.removesuffix("ForImageClassification").removesuffix("Model").removesuffix("ModelWithProjection")
    return getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**config))


def torchvision_vit(**kwargs) -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=7, **kwargs)


class Stranger(nn.Module):
    """A user's own model; `names` of its layers as they come."""

    def __init__(self, head="fc", image_size=32):
        super().__init__()
        self.cut = nn.Conv2d(3, 16, 8, 8)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        setattr(self, head, nn.Linear(16, 5))
        self.last, self.image_size = head, image_size

    def forward(self, images):
        tokens = self.block(self.cut(images).flatten(2).transpose(1, 2))
        return getattr(self, self.last)(tokens.mean(1))


class Detector(Stranger):
    """Four tokens of its own behind the patches, as YOLOS has for what it detects, or before them."""

    def __init__(self, last: bool):
        super().__init__()
        self.own, self.behind = nn.Parameter(torch.randn(1, 4, 16)), last

    def forward(self, images):
        patches = self.cut(images).flatten(2).transpose(1, 2)
        own = self.own.expand(images.shape[0], -1, -1)
        return self.fc(self.block(torch.cat([patches, own] if self.behind else [own, patches], 1)).mean(1))


# maker, last feature map, classes, width, width of the output, tokens that are no patches, head
KNOWN = {
    "torchvision vit": (torchvision_vit, "encoder", 7, 32, 7, 1, ("heads.head",)),
    "torchvision swin": (lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [2, 2], num_classes=7),
                         "permute", 7, 32, 7, 0, ("head",)),
    "torchvision convnext": (lambda: torchvision.models.ConvNeXt(
        [torchvision.models.convnext.CNBlockConfig(16, 24, 1), torchvision.models.convnext.CNBlockConfig(24, None, 1)],
        num_classes=7), "features", 7, 24, 7, 0, ("classifier.2",)),
    "hf vit": (lambda: of("ViTForImageClassification", **HF, num_labels=4), "vit.layernorm", 4, 32, 4, 1, ("classifier",)),
    "hf vit features": (lambda: of("ViTModel", **HF), "layernorm", 0, 32, 32, 1, ()),
    "hf deit": (lambda: of("DeiTForImageClassification", **HF), "deit.layernorm", 2, 32, 2, 2, ("classifier",)),
    "hf dinov2": (lambda: of("Dinov2Model", **HF), "layernorm", 0, 32, 32, 1, ()),
    "hf registers": (lambda: of("Dinov2WithRegistersModel", **HF, num_register_tokens=3), "layernorm", 0, 32, 32, 4, ()),
    "hf beit": (lambda: of("BeitForImageClassification", **HF), "beit.layernorm", 2, 32, 2, 1, ("classifier",)),
    "hf swin": (lambda: of("SwinForImageClassification", **SWIN), "swin.layernorm", 2, 32, 2, 0, ("classifier",)),
    "hf clip": (lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF, projection_dim=24)),
                "vision_model.encoder.layers.1", 0, 32, 24, 1, ()),
    "hf siglip": (lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF)),
                  "post_layernorm", 0, 32, 32, 0, ()),
    "own": (Stranger, "block", 5, 16, 5, 0, ("fc",)),
    "own embedding": (lambda: Stranger("proj"), "block", 0, 16, 5, 0, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_model_gives_is_found_by_running_it(name):
    make, *expected = KNOWN[name]
    torch.manual_seed(0)
    model = adapt(make(), SMALL)
    d = model.description
    found = [d.features, d.num_classes, d.num_features, d.output_width, d.num_prefix_tokens, d.classifier]
    assert found == expected
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        output, features = run_model(model, images)
        assert torch.equal(output, model(images)) and output.shape == (3, d.output_width)
        assert d.num_features in (features.shape[-1], features.shape[1])
        assert not any(part._forward_hooks for part in model.modules()), "the hook is temporary"
        twin = copy.deepcopy(model)
        assert torch.equal(twin(images), output)
    assert on_meta(model)(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, d.output_width)
    fresh = adapt(make(), SMALL)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images), output)
    assert not model.training and model.train().net.training


def test_tokens_that_do_not_come_before_the_patches_are_no_prefix():
    """What a fit weighs a class token by would be given to patches."""
    models = [Detector(last) for last in (False, True)]
    with torch.device("meta"):  # as where shapes are asked for
        found = [adapt(model, SMALL).description for model in models]
    assert [d.num_prefix_tokens for d in found] == [4, 0]
    assert [any("4 tokens of Detector are no patches and do not come before them" in n for n in d.notes) for d in found] == [0, 1]


class OfTorch(nn.Module):
    """torch's own encoder, whose kernel for eval mode reads its weights past their modules."""

    def __init__(self, activation, norm_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, activation, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cut, self.fc, self.image_size = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5), 32

    def forward(self, images):
        return self.fc(self.encoder(self.cut(images).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", nn.functional.gelu, nn.GELU()])
def test_torchs_own_encoder_layers_are_cut(activation, norm_first):
    given = OfTorch(activation, norm_first).eval()
    images = torch.randn(12, 3, 32, 32)
    before = given(images)
    labels = torch.arange(12) % 5
    result = moee.extract(given, (images, labels), (images + 1, labels), method="static", keep=0.75, report=silent)
    assert [layer["status"] for layer in result.info["layers"]] == ["routed"] * 2
    assert torch.equal(given(images), before) and given.encoder.layers[0].activation_relu_or_gelu
    with torch.no_grad():
        assert result.model(images).shape == (12, 5) and torch.allclose(result.dense()(images), before, atol=1e-5)


def test_timm_models_are_taken_as_they_are():
    model = timm.create_model("test_vit", pretrained=False)
    assert adapt(model) is model and library_of(model) == "timm" and has_feature_map(model)
    images = torch.randn(2, 3, 160, 160)
    features = model.forward_features(images)
    output, came = run_model(model, images)
    assert torch.equal(came, features) and torch.equal(output, model.forward_head(features))
    wrapped = adapt(Stranger())
    assert adapt(wrapped) is wrapped and isinstance(wrapped, AdaptedModel)


def test_a_model_without_a_map_says_so_once():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    model = adapt(net, InputConfig(input_size=(3, 8, 8)))
    assert not has_feature_map(model) and run_model(model, torch.zeros(2, 3, 8, 8))[1] is None
    assert [note for note in model.description.notes if "last feature map" in note]


@pytest.mark.parametrize("output, says", [
    (lambda x: [x], "a list of Tensor"), (lambda x: (x, x), "a tuple of Tensor, Tensor"), (lambda x: {"out": x}, "a dict of out"),
    (lambda x: SimpleNamespace(a=x), "a SimpleNamespace"), (lambda x: x[:, :, None, None], r"a tensor \[2, 5, 1, 1\]"),
    (lambda x: x[:1], "1 outputs for 2 images"), (lambda x: None, "a NoneType"),
])  # fmt: skip
def test_outputs_of_another_kind_are_refused_with_what_came(output, says):
    class Odd(Stranger):
        def forward(self, images):
            return output(super().forward(images))

    with pytest.raises(UserError, match=f"Odd gives {says}"):
        adapt(Odd())


def test_what_nobody_tells_is_asked_for_or_noted():
    with pytest.raises(UserError, match="does not say which size of images it takes: give --img-size"):
        adapt(Stranger(image_size=None))
    notes = adapt(Stranger()).description.notes
    assert any("guessed: mean 0.485 0.456 0.406, standard deviation" in note and "filter bicubic" in note for note in notes)
    assert any("`fc` is its last layer; --num-classes 0" in note for note in notes)
    whole = SMALL.model_copy(update={"crop_pct": 1.0, "interpolation": "bilinear"})
    assert adapt(Stranger(), whole, num_classes=5).description.notes == ()
    assert adapt(Stranger(), SMALL, num_classes=5).description.guessed == ("crop_pct", "interpolation")
    with pytest.raises(UserError, match="gives 5 outputs, --num-classes says 3"):
        adapt(Stranger(), num_classes=3)
    with pytest.raises(UserError, match="expected a torch.nn.Module"):
        adapt("vit")
    with pytest.raises(UserError, match="does not run on images of 4 x 4 pixels and 3 channels"):
        adapt(Stranger(image_size=4))


def test_the_input_comes_from_where_it_is_said():
    own = Stranger()
    own.pretrained_cfg = {"input_size": (3, 64, 48), "mean": (0.1,) * 3, "std": (0.2,) * 3, "interpolation": "bilinear"}
    config = adapt(own).pretrained_cfg
    assert config["input_size"] == (3, 64, 48) and config["mean"] == (0.1,) * 3 and config["interpolation"] == "bilinear"
    assert adapt(own, InputConfig(input_size=(3, 32, 32))).pretrained_cfg["input_size"] == (3, 32, 32)


class Renamed(nn.Module):
    """A wrapper whose state leaves its own name out, as those of torch.distributed do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self._register_state_dict_hook(lambda module, state, prefix, _: [
            state.update({prefix + name.removeprefix(f"{prefix}inner."): state.pop(name)})
            for name in list(state) if name.startswith(f"{prefix}inner.")
        ] and None)  # fmt: skip

    def forward(self, x):
        return self.inner(x)


def test_wrappers_that_rename_the_state_are_taken_off_or_refused(tmp_path):
    """What was saved of them could not be read again."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    class Small(nn.Module):
        image_size, num_classes = 32, 5

        def __init__(self):
            super().__init__()
            self.cut, self.norm, self.head = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16), nn.Linear(16, 5)
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, images):
            tokens = self.cut(images).flatten(2).transpose(1, 2)
            return self.head((tokens + self.mlp(self.norm(tokens))).mean(1))

    images = torch.randn(12, 3, 32, 32)
    model = Small()
    model.mlp = checkpoint_wrapper(model.mlp)
    result = moee.extract(model, (images, torch.arange(12) % 5), preset="static", keep=0.9)
    moee.save(result, tmp_path / "saved")
    again = moee.load(tmp_path / "saved", model=model)
    with torch.no_grad():
        assert torch.equal(again.model(images), result.model(images)), "the wrapped module was read again"
    assert type(model.mlp).__name__ == "CheckpointWrapper", "the user's stays as it is"
    model.mlp = Renamed(model.mlp._checkpoint_wrapped_module)
    with pytest.raises(UserError, match=r"other names than its modules have \(mlp.inner.0.weight\), .* give the module inside"):
        moee.extract(model, (images, torch.arange(12) % 5), preset="static", keep=0.9)


def test_a_module_of_the_same_weights_that_computes_something_else_is_refused(tmp_path):
    """Its weights have a hash; what its code makes of them, and its attributes, show in its outputs alone."""

    class Tempered(Stranger):
        temperature = 1.0

        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 5))

        def forward(self, images):
            tokens = self.block(self.cut(images).flatten(2).transpose(1, 2))
            return self.temperature * (lambda y: y + self.mlp(y))(self.fc(tokens)).mean(1)

    model, images = Tempered().eval(), torch.randn(12, 3, 32, 32)
    result = moee.extract(model, (images, torch.arange(12) % 5), preset="static", keep=0.9, num_classes=5)
    moee.save(result, tmp_path / "saved")
    assert moee.load(tmp_path / "saved", model=copy.deepcopy(model)).info["answers"]
    model.temperature = 1.1
    with pytest.raises(UserError, match="Tempered has the weights .* and gives other outputs than then: its code, or"):
        moee.load(tmp_path / "saved", model=model)
    with pytest.raises(UserError, match="gives other outputs than then"):
        check_answers(result.model, [[0.5] * 5, [0.5] * 4])


@pytest.mark.parametrize(("told", "layers"), [(10, 1), (0, 1), (1000, 2)])
def test_a_classifier_that_was_put_into_a_timm_model_says_how_many_classes_there_are(told, layers, caplog):
    """timm's own number was of the classifier before: accuracy was not compared, or that of a probe was shown."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=told)
    model.head = nn.Linear(192, 4) if layers == 1 else nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 4))
    _say_classes.cache_clear()
    assert adapt(model).num_classes == 4 and f"it has {told} classes and gives 4 outputs" in caplog.text
    assert adapt(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=told)).num_classes == told


def test_messages_call_a_model_by_its_own_class():
    with pytest.raises(UserError, match="^Stranger has no module 'net.nowhere'"):
        read_mlp(adapt(Stranger(), SMALL), "net.nowhere")
    plain = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(), nn.Linear(128, 5))
    with pytest.raises(UserError, match="^Sequential has no attention that can be narrowed"):
        find_attentions(adapt(plain, SMALL))
