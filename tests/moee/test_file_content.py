"""What a resumed run takes for the same images: their content, wherever they lie, and nothing that only looks alike."""

import os
import shutil

import pytest
import torch
from PIL import Image

import moee.store.file_content as file_content
from moee.data.image_set import ImageSet
from moee.data.sources import load_data
from moee.errors import UserError
from moee.places.resume import check_identity, fingerprint, fingerprints
from moee.store.file_content import files_digest, spread
from tests.moee.test_folders import SMALL
from tests.moee.test_shards import png, write_classes


def flat_images(root, middle=0, size=(64, 64)):
    """Uncompressed images of one size, which differ by one pixel in the middle."""
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(5):
            picture = Image.new("RGB", size, (i, 20, 30))
            picture.putpixel((size[0] // 2, size[1] // 2), (middle, 0, 0))
            picture.save(root / name / f"{i}.bmp")
    return root


def stamp(root, ns=10**18):
    for path in root.rglob("*.bmp"):
        os.utime(path, ns=(ns, ns))


def mark(root):
    return fingerprint(load_data(str(root), SMALL))


@pytest.mark.parametrize("whole", [True, False])
def test_other_images_of_the_same_names_sizes_and_times_are_others(tmp_path, monkeypatch, whole):
    """The whole content tells small sets apart; of larger ones the ends of the files, and the times of all."""
    if not whole:
        monkeypatch.setattr(file_content, "WHOLE_BYTES", 1000)
    root, size = tmp_path / "d", (64, 64) if whole else (16, 16)
    stamp(flat_images(root, size=size))
    before = mark(root)
    stamp(flat_images(root, middle=9, size=size))
    assert mark(root) != before
    stamp(flat_images(root, size=size))
    assert mark(root) == before


def test_a_larger_set_whose_unread_bytes_changed_has_other_times(tmp_path, monkeypatch):
    monkeypatch.setattr(file_content, "WHOLE_BYTES", 1000)
    root = tmp_path / "d"
    stamp(flat_images(root, size=(128, 128)))
    before = mark(root)
    flat_images(root, middle=9, size=(128, 128))
    assert mark(root) != before


@pytest.mark.parametrize("times", [True, False])
def test_the_same_images_elsewhere_are_the_same(tmp_path, times):
    flat_images(tmp_path / "d")
    shutil.copytree(tmp_path / "d", tmp_path / "e", copy_function=shutil.copy2 if times else shutil.copy)
    assert mark(tmp_path / "d") == mark(tmp_path / "e")


def test_an_image_under_another_name_or_of_another_class_is_another(tmp_path):
    before = mark(flat_images(tmp_path / "d"))
    os.rename(tmp_path / "d" / "ant" / "0.bmp", tmp_path / "d" / "ant" / "00.bmp")
    renamed = mark(tmp_path / "d")
    os.rename(tmp_path / "d" / "ant", tmp_path / "d" / "cow")
    assert len({before, renamed, mark(tmp_path / "d")}) == 3


def test_files_that_cannot_be_read_are_told_from_those_that_can(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    there = files_digest([str(tmp_path / "a")], str(tmp_path))
    (tmp_path / "a").unlink()
    assert files_digest([str(tmp_path / "a")], str(tmp_path)) != there


def test_a_sample_is_spread_from_the_first_to_the_last():
    assert spread(range(5), 9) == range(5)
    assert list(spread(range(101), 5)) == [0, 25, 50, 75, 100]


def test_shards_of_the_same_size_are_told_apart(tmp_path, monkeypatch):
    pytest.importorskip("webdataset", reason="timm's wds reader needs webdataset")
    marks = []
    for i in range(2):
        source = write_classes(tmp_path / f"{i}", train=[0, 1], val=[1, 0])
        if i:
            monkeypatch.setattr("tests.moee.test_shards.png", lambda value: png(value + 1))
            os.rename(tmp_path / "1", tmp_path / "unused")
            write_classes(tmp_path / "1", train=[0, 1], val=[1, 0])
        sizes = [path.stat().st_size for path in sorted((tmp_path / f"{i}").glob("*.tar"))]
        marks.append((sizes, fingerprint(load_data(source, SMALL))))
    assert marks[0][0] == marks[1][0] and marks[0][1] != marks[1][1]


def test_sets_of_ones_own_are_told_apart_by_their_images():
    class Own(ImageSet):
        def __init__(self, value):
            super().__init__("own", [0, 1], 2)
            self.value = value

        def load(self, index):
            return torch.full((3, 32, 32), float(self.value + index))

    assert fingerprint(Own(1)) == fingerprint(Own(1)) != fingerprint(Own(2))
    said = []
    fingerprints(Own(1), Own(2), lambda message, done, total: said.append(message))
    assert list(dict.fromkeys(said)) == ["hash of the training images", "hash of the held-out images"]


def test_a_state_of_before_is_refused_and_says_why(tmp_path):
    path, now = tmp_path / "identity.json", mark(flat_images(tmp_path / "d"))
    check_identity(path, "s/1", {"images": "0123456789abcdef"}, "an interrupted plan", "remove the folder")
    with pytest.raises(UserError, match="of an earlier version, which knew its images by names.*remove the folder"):
        check_identity(path, "s/1", {"images": now}, "an interrupted plan", "remove the folder")
    path.unlink()
    check_identity(path, "s/1", {"images": now}, "an interrupted plan", "remove the folder", said={"data": "d"})
    check_identity(path, "s/1", {"images": now}, "an interrupted plan", "remove the folder", said={"data": "elsewhere/d"})
