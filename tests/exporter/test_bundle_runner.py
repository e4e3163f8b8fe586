"""The bundle's C++: pre-processing equal to timm's on real photographs, and the runner on stand-ins for TensorRT and CUDA."""

import math
import os
import struct
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from exporter.ship.bundle_configs import preprocess as recipe_text
from exporter.ship.contents import Preprocessing
from moee.data.built_in import photo_path
from tests.exporter import runner_doubles as doubles

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, CLASSES = 8, 5
ELEMENTS = 3 * SIDE * SIDE


def timm_transform(recipe: Preprocessing):
    """Of the crop percentage that gives `recipe.resize`."""
    crop_pct = next(p for p in (1.0, 0.9, 0.875) if recipe.resize == tuple(math.floor(side / p) for side in recipe.size))
    return create_transform(
        input_size=(3, *recipe.size), interpolation=recipe.filter, mean=recipe.mean, std=recipe.std,
        crop_pct=crop_pct, crop_mode=recipe.crop, is_training=False,
    )  # fmt: skip


def ours(image: Image.Image, recipe: Preprocessing, folder) -> np.ndarray:
    image.save(folder / "image.ppm")
    (folder / "preprocess.txt").write_text(recipe_text(recipe))
    command = [doubles.preprocess(), folder / "preprocess.txt", folder / "image.ppm", folder / "out.raw"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.fromfile(folder / "out.raw", np.float32).reshape(3, *recipe.size)


RECIPES = {
    "deit": Preprocessing((224, 224), (248, 248), "center", "bicubic", MEAN, STD),
    "dinov2": Preprocessing((112, 112), (112, 112), "center", "bicubic", MEAN, STD),
    "squash": Preprocessing((97, 97), (97, 97), "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "enlarged": Preprocessing((518, 518), (592, 592), "center", "bicubic", MEAN, STD),
    "tall": Preprocessing((96, 64), (106, 71), "center", "bicubic", MEAN, STD),
    "wide": Preprocessing((97, 224), (97, 224), "center", "bilinear", MEAN, STD),
    "squashed to a rectangle": Preprocessing((64, 96), (73, 109), "squash", "bicubic", MEAN, STD),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("photo", ["coffee.png", "china.jpg", "rocket.jpg"])
def test_preprocessing_is_timms_on_photographs(tmp_path, name, photo):
    recipe = RECIPES[name]
    image = Image.open(photo_path(photo)).convert("RGB")
    if photo == "rocket.jpg":
        image = image.transpose(Image.Transpose.ROTATE_90).crop((3, 5, 200, 338))  # upright, odd sides
    expected = timm_transform(recipe)(image).numpy()
    # Pillow 13 swaps the passes where the height shrinks much more than the width: then one step of 8 bits
    swapped = recipe.crop == "squash" and image.height * recipe.resize[1] > image.width * recipe.resize[0]
    step = 1 / 255 / min(recipe.std)
    assert np.abs(ours(image, recipe, tmp_path) - expected).max() <= (1.01 * step if swapped else 1e-6)


def test_every_step_of_the_preprocessing_matters(tmp_path):
    """The comparison above would notice another filter, crop or size."""
    image = Image.open(photo_path("coffee.png")).convert("RGB")
    right = RECIPES["deit"]
    expected = timm_transform(right)(image).numpy()
    for wrong in (Preprocessing((224, 224), (248, 248), "center", "bilinear", MEAN, STD),
                  Preprocessing((224, 224), (248, 248), "squash", "bicubic", MEAN, STD),
                  Preprocessing((224, 224), (256, 256), "center", "bicubic", MEAN, STD),
                  Preprocessing((224, 224), (248, 248), "center", "bicubic", STD, STD)):  # fmt: skip
        assert np.abs(ours(image, wrong, tmp_path) - expected).max() > 0.05


def test_grey_images_and_comments_in_the_header(tmp_path):
    pixels = np.arange(12 * 12, dtype=np.uint8)
    (tmp_path / "grey.ppm").write_bytes(b"P5\n# a comment\n12 12\n# another\n255\n" + pixels.tobytes())
    recipe = Preprocessing((12, 12), (12, 12), "center", "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    (tmp_path / "preprocess.txt").write_text(recipe_text(recipe))
    command = [doubles.preprocess(), tmp_path / "preprocess.txt", tmp_path / "grey.ppm", tmp_path / "out.raw"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    got = np.fromfile(tmp_path / "out.raw", np.float32).reshape(3, 144)
    np.testing.assert_array_equal(got, np.tile(pixels.astype(np.float32) / np.float32(255), (3, 1)))


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "expected a binary PPM"), (b"P6\n4 4\n255\n123", "cut short"), (b"P6\n4 0\n255\n", "damaged"),
     (b"P3\n1 1\n255\n1", "expected"), (b"P6\n99999999 99999999\n255\n", "promises"),
     (b"P6\n2 2\n65535\n" + bytes(24), "8 bits"), (b"P6\n-4 4\n255\n", "damaged"),
     (b"P6 # no end", "damaged"), (b"P5\n20000 1\n255\n" + bytes(20000), "its 20000 x 1 pixels would be resized to 250 million"),
     (b"P5\n1 200000\n255\n" + bytes(200000), "would be resized to 2508 million")],
)  # fmt: skip
def test_damaged_images_are_one_sentence(tmp_path, data, said):
    (tmp_path / "image.ppm").write_bytes(data)
    (tmp_path / "preprocess.txt").write_text(recipe_text(RECIPES["dinov2"]))
    command = [doubles.preprocess(), tmp_path / "preprocess.txt", tmp_path / "image.ppm", tmp_path / "out.raw"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [("size 112 112", "size is missing"), ("size 112|size 112 112\nsize 9", "repeated"),
     ("crop center|crop border", "expected center"), ("filter bicubic|filter lanczos", "expected bicubic"),
     ("resize 112|resize 9", "below size"), ("resize 112 112|resize 112 9", "below size"),
     ("std 0.229|std 0", "three numbers"), ("mean 0.485 0.456|mean 0.485", "three numbers"),
     ("size 112|size x", "above 0"), ("size 112 112|size 112", "above 0")],
)  # fmt: skip
def test_a_damaged_recipe_is_refused(tmp_path, change, said):
    old, _, new = change.partition("|")
    text = "\n".join(line for line in recipe_text(RECIPES["dinov2"]).splitlines()) + "\n"
    (tmp_path / "preprocess.txt").write_text(text.replace(f"\n{old}", f"\n{new}", 1))
    command = [doubles.preprocess(), tmp_path / "preprocess.txt", tmp_path / "x.ppm", tmp_path / "out.raw"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr


def moee_run(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    variables = {**os.environ, "LD_LIBRARY_PATH": str(doubles.fakes()), **environment}
    return subprocess.run([str(doubles.run()), *map(str, arguments)], capture_output=True, text=True, env=variables, cwd=cwd)


def expected_output(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1)
    return np.stack([flat[:, k::CLASSES].sum(1, dtype=np.float64) for k in range(CLASSES)], 1)


@pytest.fixture
def engine(tmp_path):
    (tmp_path / "moee.plan").write_text(f"{ELEMENTS} {CLASSES} 1 4 0 1")
    return ["--engine", tmp_path / "moee.plan", "--plugin", "libmoee_plugin.so", "--runs", 3, "--warm-up", 1]


@pytest.mark.parametrize("count", [1, 4, 10])
def test_runner_on_raw_tensors(engine, tmp_path, count):
    images = np.random.default_rng(0).standard_normal((count, 3, SIDE, SIDE)).astype(np.float32)
    images.tofile(tmp_path / "in.raw")
    done = moee_run(*engine, "--raw", tmp_path / "in.raw", "--out", tmp_path / "out.raw")
    assert done.returncode == 0, done.stderr
    got = np.fromfile(tmp_path / "out.raw", np.float32).reshape(count, CLASSES)
    np.testing.assert_allclose(got, expected_output(images), atol=1e-4)
    *lines, latency = done.stdout.splitlines()
    classes = [int(line.split("class ")[1].split()[0]) for line in lines]
    assert classes == expected_output(images).argmax(1).tolist()
    assert latency.startswith(f"latency on Fake GPU, batch {min(count, 4)}: p50 ") and "over 3 runs" in latency


def test_runner_on_images_with_head_and_labels(engine, tmp_path):
    rng = np.random.default_rng(1)
    folder = tmp_path / "ppm"
    folder.mkdir()
    recipe = Preprocessing((SIDE, SIDE), (SIDE, SIDE), "center", "bicubic", MEAN, STD)
    (tmp_path / "preprocess.txt").write_text(recipe_text(recipe))
    expected = []
    for i in range(3):
        image = Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8))
        image.save(folder / f"{i}.ppm")
        expected.append(timm_transform(recipe)(image).numpy())
    (folder / "ignored.txt").write_text("x")
    weight, bias = rng.standard_normal((3, CLASSES)).astype(np.float32), rng.standard_normal(3).astype(np.float32)
    (tmp_path / "head.bin").write_bytes(struct.pack("<ii", 3, CLASSES) + weight.tobytes() + bias.tobytes())
    (tmp_path / "labels.txt").write_text("cat\ndog\nbird\n")
    done = moee_run(*engine, "--images", folder, "--recipe", tmp_path / "preprocess.txt", "--head", tmp_path / "head.bin",
                    "--labels", tmp_path / "labels.txt", "--batch", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = expected_output(np.stack(expected)) @ weight.T + bias
    names = [line.split(": ")[1].split(" (")[0] for line in done.stdout.splitlines()[:3]]
    assert names == [("cat", "dog", "bird")[k] for k in scores.argmax(1)]
    values = [float(line.split("(")[1].rstrip(")")) for line in done.stdout.splitlines()[:3]]
    np.testing.assert_allclose(values, scores.max(1), rtol=1e-4, atol=1e-3)


def test_labels_of_the_bundle_are_found_and_others_must_fit(engine, tmp_path):
    """The runner starts in the bundle's folder; models/labels.txt there is of the classes, not of features without a head."""
    np.arange(ELEMENTS, dtype=np.float32).tofile(tmp_path / "in.raw")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "labels.txt").write_text("".join(f"größe {k}\n" for k in range(CLASSES)), encoding="utf-8")
    done = moee_run(*engine, "--raw", tmp_path / "in.raw", cwd=tmp_path)
    assert done.returncode == 0 and "tensor 0: größe " in done.stdout
    (tmp_path / "models" / "labels.txt").write_text("cat\ndog\n")
    assert "tensor 0: class " in moee_run(*engine, "--raw", tmp_path / "in.raw", cwd=tmp_path).stdout
    for name, said in (("models/labels.txt", "names 2 classes of 5"), ("absent.txt", "absent.txt: cannot be read")):
        done = moee_run(*engine, "--raw", tmp_path / "in.raw", "--labels", tmp_path / name)
        assert done.returncode == 2 and said in done.stderr


def test_features_have_no_class(engine, tmp_path):
    values = np.random.default_rng(3).standard_normal((2, ELEMENTS)).astype(np.float32)
    values.tofile(tmp_path / "in.raw")
    done = moee_run(*engine, "--raw", tmp_path / "in.raw", "--output", "features")
    lengths = np.linalg.norm(expected_output(values.reshape(2, 3, SIDE, SIDE)), axis=1)
    for i, line in enumerate(done.stdout.splitlines()[:2]):
        assert line.startswith(f"tensor {i}: {CLASSES} features, length ") and "class " not in line
        assert float(line.split("length ")[1]) == pytest.approx(lengths[i], abs=1e-3)
    done = moee_run(*engine, "--raw", tmp_path / "in.raw", "--output", "labels")
    assert done.returncode == 2 and "--output labels: expected classes or features" in done.stderr


def test_half_precision_engines(engine, tmp_path):
    (tmp_path / "moee.plan").write_text(f"{ELEMENTS} {CLASSES} 1 4 1 1")
    values = np.random.default_rng(2).standard_normal((2, ELEMENTS)).astype(np.float32)
    values[0, :10] = [0.0, -0.0, 6.1e-5, 5.9e-8, 1e-9, 1e5, -1e5, 65504, 65519, 2.0**-24]
    values.tofile(tmp_path / "in.raw")
    done = moee_run(*engine, "--raw", tmp_path / "in.raw", "--out", tmp_path / "out.raw")
    assert done.returncode == 0, done.stderr
    got = np.fromfile(tmp_path / "out.raw", np.float32).reshape(2, CLASSES)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = torch.from_numpy(values).half().float().numpy()
        expected = expected_output(rounded).astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-3)


def test_runner_says_what_is_wrong(engine, tmp_path):
    raw = tmp_path / "in.raw"
    np.zeros(ELEMENTS, np.float32).tofile(raw)
    (tmp_path / "bad.plan").write_text("nonsense")
    (tmp_path / "empty").mkdir()
    plain = ["--engine", tmp_path / "moee.plan"]
    cases = [
        ([], "usage: moee_run"),
        ([*engine, "--raw"], "without a value"),
        ([*engine, "--raw", raw, "--colour", "1"], "--colour: unknown"),
        ([*engine, "--raw", raw, "--batch", "9"], "batch 9 is outside the engine's profile, 1 to 4"),
        ([*engine, "--raw", raw, "--batch", "x"], "--batch x: expected a number"),
        ([*plain, "--raw", raw], "could not find plugin MoeeFfn"),
        ([*plain, "--plugin", "absent.so", "--raw", raw], "absent.so was not loaded"),
        (["--engine", tmp_path / "bad.plan", "--raw", raw], "not an engine"),
        (["--engine", tmp_path / "none.plan", "--raw", raw], "cannot be read"),
        ([*engine, "--raw", tmp_path / "none.raw"], "cannot be read"),
        ([*engine, "--raw", tmp_path / "moee.plan"], "multiple of 192"),
        ([*engine, "--images", tmp_path / "empty", "--recipe", tmp_path / "none.txt"], "cannot be read"),
        ([*engine, "--raw", raw, "--device", "3"], "cuDeviceGet: CUDA_ERROR_FAKE"),
        ([*engine, "--raw", raw, "--tensorrt", "/none.so"], "/none.so cannot be opened"),
        ([*engine, "--raw", raw, "--head", raw], "not a classifier"),
    ]
    for arguments, said in cases:
        done = moee_run(*arguments)
        assert done.returncode == 2 and said in done.stderr, (arguments, done.returncode, done.stderr)
    assert "CUDA_ERROR_FAKE" in moee_run(*engine, "--raw", raw, FAKE_NO_DEVICE="1").stderr


def test_runner_without_a_driver(engine, tmp_path):
    np.zeros(ELEMENTS, np.float32).tofile(tmp_path / "in.raw")
    command = [doubles.run(), *engine, "--raw", tmp_path / "in.raw"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if "no CUDA driver" not in done.stderr:
        pytest.skip("this machine has a CUDA driver")
    assert done.returncode == 2
