"""How a loader prepares images, read from torchvision's transforms, and what is said where nobody knows."""

import logging

import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import VisionTransformer
from torchvision.transforms import v2

import exporter
import moee
from moee.data.transform import Transform, evaluation
from moee.errors import UserError
from moee.given.preparation import differences, read_preparation
from moee.stages.confirmation import fresh_images
from moee.stages.opened import session_of

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
BICUBIC = transforms.InterpolationMode.BICUBIC
END = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(("ant", "bee")):
        (root / name).mkdir()
        for i in range(12):
            pixels = torch.randint(0, 256, (40, 56, 3), generator=generator, dtype=torch.uint8)
            pixels[..., label] = 255
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


def loader(folder, *steps):
    return DataLoader(ImageFolder(folder, transforms.Compose(steps)), 8)


class Patches(torch.nn.Module):
    """A small ViT of one's own that says nothing of its images."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = torch.nn.Conv2d(3, 16, 8, 8), torch.nn.LayerNorm(16)
        self.fc1, self.act, self.fc2 = torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16)
        self.head = torch.nn.Linear(16, 2)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.fc2(self.act(self.fc1(self.norm(x))))).mean(1))


@pytest.mark.parametrize("told", [None, {"input_size": (3, 32, 32)}, {"interpolation": "bicubic"}])
def test_what_is_not_said_of_the_images_is_as_the_loader_prepares_them(folder, told):
    """A part that is said takes its own place alone."""
    both = loader(folder, transforms.Resize(36), transforms.CenterCrop(32), *END)
    val = Subset(both.dataset, range(0, 24, 3))
    train = Subset(both.dataset, [i for i in range(24) if i % 3])
    transform = session_of(Patches(), train, val, input=told).transform
    config = transform.config
    assert transform.shape == (3, 32, 32) and transform.mean == pytest.approx(MEAN) and transform.std == pytest.approx(STD)
    assert config["crop_pct"] == pytest.approx(32 / 36, abs=0.02)
    assert config["interpolation"] == ("bicubic" if told and "interpolation" in told else "bilinear")


@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader", "iterable"])
def test_the_size_is_that_of_the_images_where_the_module_does_not_say_it(kind):
    images, labels = torch.randn(20, 3, 24, 32), torch.arange(20) % 2
    data = TensorDataset(images, labels)
    given = {"tensors": (images, labels), "dataset": data, "loader": DataLoader(data, 4), "iterable": iter([(images, labels)])}
    if kind == "iterable":  # looking at it would use it up
        with pytest.raises(UserError, match=r"say which size of images it takes: give input=\{'input_size': \(channels, height"):
            exporter.compress(Patches(), given[kind], out="unused-folder")
    else:
        model, state = Patches(), torch.get_rng_state()
        assert session_of(model, given[kind]).transform.shape == (3, 24, 32)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("steps", "crop", "mode", "kind"), [
    ([transforms.Resize(36), transforms.CenterCrop(32), *END], 32 / 36, "center", "bilinear"),
    ([transforms.Resize(32, BICUBIC), transforms.CenterCrop((32, 32)), *END], 1.0, "center", "bicubic"),
    ([transforms.Resize((32, 32)), *END], 1.0, "squash", "bilinear"),
    ([v2.Resize([37]), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)],
     32 / 37, "center", "bilinear"),
    ([transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32)]), *END], 32 / 36, "center", "bilinear"),
])  # fmt: skip
def test_what_a_transform_says_is_what_timms_then_does(folder, steps, crop, mode, kind):
    given = loader(folder, *steps)
    found = read_preparation(given)
    assert found is not None and found.mean == pytest.approx(MEAN) and found.std == pytest.approx(STD)
    assert found.crop_pct == pytest.approx(crop, abs=0.02) and (found.crop_mode, found.interpolation) == (mode, kind)
    config = {**found.model_dump(exclude_none=True), "input_size": (3, 32, 32)}
    ours = evaluation(Transform((3, 32, 32), found.mean, found.std, config))
    picture = Image.open(given.dataset.samples[0][0])
    assert torch.allclose(ours(picture), given.dataset[0][0], atol=0.05)
    assert differences(found, Transform((3, 32, 32), found.mean, found.std, config)) == []


@pytest.mark.parametrize("steps", [
    [transforms.RandomResizedCrop(32), *END], [transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()],
    [transforms.Resize(36), transforms.CenterCrop(32), transforms.Grayscale(3), *END],
    [transforms.Resize((40, 36)), transforms.CenterCrop(32), *END], [transforms.Resize(30), transforms.CenterCrop(32), *END],
    [transforms.Resize(36, max_size=40), transforms.CenterCrop(32), *END],
    [v2.Resize(36), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize((127.0,) * 3, (50.0,) * 3)],
    [v2.Resize(36), v2.CenterCrop(32), v2.PILToTensor(), v2.Normalize((127.0,) * 3, (50.0,) * 3)],
    [transforms.Resize(36), transforms.CenterCrop(32), *END, transforms.Normalize(MEAN, STD)],
    [transforms.Resize(16), transforms.Resize(36), transforms.CenterCrop(32), *END],
    [transforms.CenterCrop(32), transforms.Resize(32), *END],
    [transforms.ToTensor(), transforms.Resize(36, antialias=False), transforms.CenterCrop(32), END[1]],
    [*END, transforms.Resize(36), transforms.CenterCrop(32)],
])  # fmt: skip
def test_what_cannot_be_read_whole_is_not_read(folder, steps):
    assert read_preparation(loader(folder, *steps)) is None
    assert read_preparation((torch.zeros(2, 3, 8, 8), torch.zeros(2))) is None


def test_a_loader_that_collates_in_a_way_of_its_own_is_not_read(folder):
    data = loader(folder, transforms.Resize(36), transforms.CenterCrop(32), *END).dataset
    assert read_preparation(DataLoader(data, 8)) is not None
    assert read_preparation(DataLoader(data, 8, collate_fn=lambda batch: batch)) is None


class Softmax(torch.nn.Module):
    """A classifier whose last layer is no linear map."""

    def __init__(self):
        super().__init__()
        self.net, self.image_size = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=2), 32

    def forward(self, x):
        return self.net(x).softmax(-1)


def test_what_is_guessed_of_the_outputs_is_said_in_python(caplog):
    torch.manual_seed(0)
    images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 2
    result = moee.extract(Softmax(), (images[:12], labels[:12]), (images[12:], labels[12:]), preset="static", keep=0.7)
    assert "outputs" in caplog.text and "taken for features; num_classes=2 says that they are classes" in caplog.text
    assert result.probe is not None
    caplog.clear()
    given = ((images[:12], labels[:12]), (images[12:], labels[12:]))
    assert moee.extract(Softmax(), *given, preset="static", keep=0.7, num_classes=2).probe is None
    assert "taken for features" not in caplog.text


def test_a_bundle_of_features_takes_the_probe_of_the_model_at_hand(folder, tmp_path):
    data = loader(folder, transforms.Resize(36), transforms.CenterCrop(32), *END).dataset
    torch.manual_seed(0)
    train, val = Subset(data, range(0, 24, 2)), Subset(data, range(1, 24, 2))
    result = moee.extract(Softmax(), train, val, preset="static", keep=0.7, num_classes=0)
    exporter.export(result, tmp_path / "export")
    with pytest.raises(UserError, match="names 2 classes; the classifier that tells them apart lies beside the artifact"):
        exporter.bundle(tmp_path / "export", tmp_path / "bundle", sm=87, model=result.spec.module)
    exporter.bundle(tmp_path / "export", tmp_path / "bundle", sm=87, model=result)
    assert (tmp_path / "bundle/models/head.bin").is_file()
    assert (tmp_path / "bundle/models/labels.txt").read_text().split() == ["ant", "bee"]


def test_the_loaders_preparation_reaches_the_bundle(folder, tmp_path, caplog):
    steps = [transforms.Resize(36), transforms.CenterCrop(32), *END]
    torch.manual_seed(0)
    model = VisionTransformer(32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=2)
    data = loader(folder, *steps).dataset
    train, val = Subset(data, range(0, 24, 2)), Subset(data, range(1, 24, 2))
    result = moee.extract(model, train, val, preset="static", keep=0.7)
    exporter.export(result, tmp_path / "export")
    exporter.bundle(tmp_path / "export", tmp_path / "bundle", sm=87, model=result)
    told = dict(line.split(" ", 1) for line in (tmp_path / "bundle/models/preprocess.txt").read_text().splitlines())
    assert (told["resize"], told["filter"], told["crop"]) == ("36 36", "bilinear", "center")
    assert [float(v) for v in told["mean"].split()] == pytest.approx(MEAN)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "prepare" in record.message]


def test_what_nobody_says_is_a_warning_at_extraction_and_in_the_bundle(folder, tmp_path, caplog):
    torch.manual_seed(0)
    model = VisionTransformer(32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=2)
    images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 2
    result = moee.extract(model, (images[:12], labels[:12]), (images[12:], labels[12:]), preset="static", keep=0.7)
    assert "nobody says how the images were prepared" in caplog.text and "share that the middle crop keeps 0.875" in caplog.text
    caplog.clear()
    exporter.export(result, tmp_path / "export")
    exporter.bundle(tmp_path / "export", tmp_path / "bundle", sm=87, model=result)
    assert "nobody said how the model's images are prepared" in caplog.text


def test_images_of_a_folder_that_are_prepared_by_a_guess_are_told(folder, caplog):
    model = Patches()
    model.img_size = 32
    assert session_of(model, str(folder)).unlike == ()
    assert f"those of {folder} are prepared by a guess: mean 0.485 0.456 0.406" in caplog.text
    images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 2
    result = moee.extract(model, (images[:12], labels[:12]), (images[12:], labels[12:]), preset="static", keep=0.7)
    caplog.clear()
    moee.evaluate(result, folder)
    assert "prepared by a guess" in caplog.text
    caplog.clear()
    session_of(model, folder, input={"mean": MEAN, "std": STD, "crop_pct": 1.0, "interpolation": "bilinear"})
    assert "guess" not in caplog.text


def test_images_that_were_prepared_otherwise_confirm_nothing(folder):
    """The very images that a model was chosen by were taken for new ones."""
    steps = [transforms.Resize(36), transforms.CenterCrop(32), *END]
    whole = loader(folder, *steps).dataset
    train, val = Subset(whole, range(0, 24, 2)), Subset(whole, range(1, 24, 2))
    images = torch.stack([image for image, _ in train]), torch.tensor([label for _, label in train])
    held_out = torch.stack([image for image, _ in val]), torch.tensor([label for _, label in val])
    model = Patches()
    model.img_size = 32
    with pytest.raises(UserError, match=r"new cannot be told.*guessed: mean 0.485.*say with input=\{\.\.\.\} how"):
        fresh_images(session_of(model, images, held_out), str(folder))
    with pytest.raises(UserError, match=r"otherwise \(crop_pct 0.8.*, not 0.5"):
        fresh_images(session_of(model, train, val, input={"crop_pct": 0.5}), str(folder))
    with pytest.raises(UserError, match="none of the 24 images .* is new"):
        fresh_images(session_of(model, train, val), str(folder))


def test_a_loader_that_differs_from_the_models_description_is_told(folder, caplog):
    model = moee.load_model("test_vit", random_weights=0, num_classes=2, img_size=32)
    data = loader(folder, transforms.Resize(32), transforms.CenterCrop(32), *END).dataset
    moee.extract(model, Subset(data, range(0, 24, 2)), Subset(data, range(1, 24, 2)), preset="static", keep=0.7)
    assert "the loader prepares images by mean 0.5 0.4 0.3, not" in caplog.text and "crop_pct 1, not" in caplog.text


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"mean": (0.5, 0.4)}, "mean of input= has 2 numbers, and the images 3 channels; give one for each"),
        ({"std": (0.5,) * 4}, "std of input= has 4 numbers"),
        ({"input_size": (3, 48, 48)}, "input_size of input= is 3 x 48 x 48, and the model takes images of 3 x 32 x 32"),
        ({"std": (0.5, 0, 0.5)}, "^std of input=: expected a number above 0"),
    ],
)
def test_a_description_that_does_not_fit_the_images_is_refused(said, reason, tmp_path):
    """Two means were once taken in turns for three channels, and another size was not obeyed; a bundle's runner got both."""
    model = timm.create_model("test_vit", img_size=32, num_classes=2).eval()
    images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 2
    given = ((images[:12], labels[:12]), (images[12:], labels[12:]))
    with pytest.raises(UserError, match=reason):
        moee.extract(model, *given, preset="static", keep=0.7, input=said)
    with pytest.raises(UserError, match=reason):
        exporter.compress(model, *given, out=tmp_path / "out", input=said)
