"""Images of another size than the model's own: rectangles, models that take any size, and what is refused before any work."""

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from timm.layers import resample_abs_pos_embed

from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.data.built_in import photo_path
from moee.data.collage import Collages
from moee.data.image_set import TensorSet
from moee.data.sources import load_data
from moee.data.transform import model_transform
from moee.data.views import Views
from moee.errors import UserError
from moee.measure.metrics import dense_macs, tokens_per_image
from moee.methods.recipe import Recipe, method_options
from moee.models.input_size import sized
from moee.models.model import ModelSpec, build_model, load_model
from tests.conftest import extract, tiny_spec

TALL = (96, 64)


def named(name: str, random_seed: int | None = None) -> ModelSpec:
    return ModelSpec(name=name, timm_name=name, random_seed=random_seed)


def laid_out(spec: ModelSpec):
    with torch.device("meta"):
        return build_model(spec)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224", "levit_128s", "maxvit_nano_rw_256",
     "twins_svt_small", "mixer_s32_224", "test_convnext", "convnext_tiny", "caformer_s18", "pvt_v2_b0", "vit_tiny_r_s16_p8_224"],
)  # fmt: skip
def test_every_kind_of_model_runs_at_the_rectangle_that_is_asked_for(name):
    """Constructors that take img_size and remember it, that take it and forget it, and that know no size."""
    model = laid_out(sized(named(name), TALL))
    assert model_transform(model).shape == (3, *TALL)
    square, rectangle = (dense_macs(laid_out(sized(named(name), size)), (3, *size)) for size in ((64, 64), TALL))
    assert square < rectangle
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, *TALL), "timm's own functions see it too"


def test_one_number_is_a_square_and_is_recorded_as_before():
    assert sized(named("vit_tiny_patch16_224"), [64]).kwargs == {"img_size": 64} == sized(named("test_vit"), (64, 64)).kwargs
    assert sized(named("vit_tiny_patch16_224"), TALL).kwargs == {"img_size": [96, 64]}
    assert sized(named("convnext_tiny"), TALL).input_size == TALL and not sized(named("convnext_tiny"), TALL).kwargs


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [("vit_tiny_patch16_224", (96, 65), "patches of 16 x 16 pixels; give multiples"),
     ("vit_small_patch14_dinov2", (64,), "patches of 14 x 14 pixels"),
     ("swin_tiny_patch4_window7_224", (66, 64), "patches of 4 x 4 pixels"),
     ("maxvit_tiny_tf_224", (65,), "maxvit_tiny_tf_224 cannot take images of 65 x 65 pixels"),
     ("nest_tiny", TALL, "only handles square inputs"),
     ("mvitv2_tiny", TALL, "mvitv2_tiny refused the arguments"),
     ("crossvit_tiny_240", TALL, "cannot take images of 96 x 64 pixels"),
     ("efficientformer_l1", TALL, "cannot take images of 96 x 64 pixels"),
     ("convnext_tiny", (1,), "cannot take images of 1 x 1 pixels"),
     ("vit_tiny_patch16_224", (0,), "from 1 to 4096 pixels"), ("vit_tiny_patch16_224", (-16, 16), "from 1 to 4096"),
     ("vit_tiny_patch16_224", (1 << 20,), "from 1 to 4096"), ("vit_tiny_patch16_224", (32, 32, 32), "height and width")],
)  # fmt: skip
def test_a_size_that_the_model_cannot_take_is_one_sentence(name, size, said):
    with pytest.raises(UserError, match=said) as error:
        sized(named(name), size)
    assert str(error.value).startswith(f"--img-size {' '.join(map(str, size))}: ")


class Squeezing(torch.nn.Module):
    """Drops the dimension of a batch of one."""

    def __init__(self):
        super().__init__()
        self.net, self.num_classes, self.img_size = timm.create_model("test_vit", num_classes=4, img_size=32), 4, 32

    def forward(self, x):
        return self.net(x).squeeze()


class InPython(Squeezing):
    """Reads values of tensors outside of torch."""

    def forward(self, x):
        return self.net(x + float(x.numpy().mean()))


def squeezing():
    return Squeezing()


def in_python():
    return InPython()


@pytest.mark.parametrize(
    ("function", "said"),
    [("squeezing", "does not run on one image of 32 x 32 pixels: .*gives a tensor \\[4\\]"),
     ("in_python", "its forward reads values of tensors in Python, which cannot be exported")],
)  # fmt: skip
def test_another_size_is_advised_only_where_it_can_help(function, said):
    name = f"{__name__}:{function}"
    with pytest.raises(UserError, match=said) as error:
        sized(ModelSpec(name=name, timm_name=name, library="python").with_word(name), [32])
    assert "another size" not in str(error.value)
    with pytest.raises(UserError, match="65 x 65 pixels .*; give another size"):
        sized(named("maxvit_tiny_tf_224"), [65])


def test_an_unknown_model_is_called_that():
    with pytest.raises(UserError, match="^unknown model"):
        sized(named("vit_nosuch"), TALL)


@pytest.mark.parametrize("size", [(0, 32), (32, 5000), (32,), (1, 2, 3)])
def test_a_recorded_size_is_bounded(size):
    with pytest.raises(ValueError):
        ModelSpec(name="m", timm_name="convnext_tiny", input_size=size)


def test_results_of_another_size_are_not_taken_for_this_one():
    """Cells of an ablation and plans are found again by what `identity` holds."""
    sizes = [sized(named("test_convnext"), size).identity() for size in (TALL, (64, 96))] + [named("test_convnext").identity()]
    assert all(a != b for i, a in enumerate(sizes) for b in sizes[:i])
    assert "input_size" not in sizes[2], "results of earlier versions are still found"


@pytest.mark.parametrize("size", [TALL, (64, 96)])
@pytest.mark.parametrize("changes", [{}, {"crop_mode": "squash"}, {"crop_pct": 1.0}])
def test_image_files_are_prepared_as_timm_prepares_them(tmp_path, size, changes):
    model = load_model(tiny_spec(img_size=size))
    model.pretrained_cfg = {**model.pretrained_cfg, **changes}
    for i, name in enumerate(("coffee.png", "rocket.jpg")):
        Image.open(photo_path(name)).convert("RGB").resize((150, 110 + 90 * i)).save(tmp_path / f"{i}.png")
    transform = model_transform(model)
    data = load_data(str(tmp_path), transform)
    theirs = create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for i in range(len(data)):
        assert data.load(i).shape == (3, *size)
        with Image.open(data.describe(i)) as picture:
            torch.testing.assert_close(data.load(i), theirs(picture), rtol=0, atol=0)


def test_built_in_images_views_and_collages_fill_the_rectangle():
    transform = model_transform(load_model(tiny_spec(img_size=TALL)))
    digits, photos = load_data("digits", transform, "val"), load_data("photos:1", transform)
    assert digits.images.shape[1:] == photos.images.shape[1:] == (3, *TALL)
    for data in (photos, digits):
        assert Views(data, transform, 1, 0).load(3).shape == (3, *TALL)
        collage = transform.pixels(Collages(data, transform, 1, 0).load(3))
        assert collage.shape == (3, *TALL) and -1e-6 <= collage.min() and collage.max() <= 1 + 1e-6
    rows = torch.stack([Collages(photos, transform, 1, 0).load(i)[:, 64:] for i in range(8)])
    assert rows.std() > 0.3, "the part below the square is drawn on as well"


def test_position_embeddings_of_a_square_are_resampled_to_the_rectangle(tmp_path):
    model = load_model(tiny_spec())
    torch.nn.init.normal_(model.pos_embed)
    save_file(model.state_dict(), tmp_path / "square.safetensors")
    weights = {"weights": str(tmp_path / "square.safetensors"), "random_seed": None}
    spec = tiny_spec(img_size=[96, 64]).model_copy(update=weights)
    expected = resample_abs_pos_embed(model.pos_embed, new_size=(12, 8), num_prefix_tokens=1)
    torch.testing.assert_close(load_model(spec).pos_embed, expected)


@pytest.mark.parametrize("spec", [tiny_spec(img_size=[96, 64]), sized(named("test_convnext", 0), TALL)], ids=["vit", "convnext"])
def test_an_artifact_keeps_its_rectangle(tmp_path, spec):
    model = load_model(spec)
    names = [f"blocks.{i}.mlp" for i in range(3)] if "img_size" in spec.kwargs else ["stages.3.blocks.0.mlp"]
    tokens = tokens_per_image(model, names, (3, *TALL))
    images = torch.randn(24, 3, *TALL, generator=torch.Generator().manual_seed(0))
    config = method_options(clustering="kmeans", clusters=2, cluster_tokens=200, components=4, compensation="mean")
    extract(model, TensorSet("noise", images, [-1] * 24), config)
    checkpoint.save(MoeeModel(model.eval(), spec, Recipe.of(config), "noise"), tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert model_transform(loaded.model).shape == model_transform(loaded.dense()).shape == (3, *TALL)
    assert tokens == tokens_per_image(loaded.dense(), names, (3, *TALL)) and tokens[names[0]] in (12 * 8 + 1, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images[:2]), model(images[:2]))
