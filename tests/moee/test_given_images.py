"""Images from Python: loaders, datasets and iterables, with the labels that they mean."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from moee.data.image_set import TensorSet, batches
from moee.errors import UserError
from moee.given.datasets import DatasetSet
from moee.given.images import given_images, given_splits

SHAPE = (3, 8, 8)


class Pairs(Dataset):
    """Images whose first value is their position, and `apart` more; classes by name if there are any."""

    def __init__(self, labels, classes=None, size=8, apart=0.0):
        self.labels, self.size, self.reads, self.apart = labels, size, 0, apart
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.reads += 1
        return torch.full((3, self.size, self.size), index + self.apart), self.labels[index]


class Stream(IterableDataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __iter__(self):
        return (self.pairs[i] for i in range(len(self.pairs)))


def seen(data):
    """Positions and labels of a set, by reading it."""
    return [(int(image[0, 0, 0]), int(label)) for b in batches(data, 4) for image, label in zip(b.images, b.labels, strict=True)]


def expected(labels):
    return list(enumerate(labels))


def batch(data, positions):
    """Images and labels of some positions; none give a batch of nothing."""
    images = [data[i][0] for i in positions]
    labels = torch.tensor([data[i][1] for i in positions], dtype=torch.int64)
    return torch.stack(images) if images else torch.empty(0, *SHAPE), labels


LABELS = [0, 1, 2, 1, 0, 2, 2, 0]


@pytest.mark.parametrize(
    "give",
    [
        lambda d: DataLoader(d, batch_size=3),
        lambda d: DataLoader(d, batch_size=3, shuffle=True),
        lambda d: d,
        lambda d: [batch(d, range(3)), batch(d, range(3, len(d)))],
        lambda d: batch(d, range(len(d))),
        lambda d: (d[i] for i in range(len(d))),
        lambda d: DataLoader(Stream(d), batch_size=3),
        lambda d: DataLoader(d, batch_size=3, collate_fn=lambda items: {
            "pixel_values": torch.stack([i for i, _ in items]), "labels": torch.tensor([t for _, t in items]),
        }),
    ],
    ids=["loader", "shuffled", "dataset", "batches", "tensors", "generator of images", "iterable dataset", "own collate"],
)  # fmt: skip
def test_every_form_gives_the_same_images_and_labels(give):
    train, val = given_splits(give(Pairs(LABELS)), give(Pairs(LABELS[:3], apart=0.5)), shape=SHAPE, head_classes=3)
    assert seen(train) == expected(LABELS) and seen(val) == expected(LABELS[:3])
    assert train.classes == val.classes == ("0", "1", "2")


def test_a_loader_neither_draws_from_the_callers_numbers_nor_ignores_its_sampler():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    whole = Pairs(LABELS)
    some, others = (DataLoader(whole, sampler=SubsetRandomSampler(part)) for part in ([1, 3, 5, 0, 4], [2, 6]))
    train, val = given_splits(some, others, shape=SHAPE)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [p for p, _ in seen(train)] == [0, 1, 3, 4, 5] and [p for p, _ in seen(val)] == [2, 6]
    weighted = WeightedRandomSampler([1.0, 0.0] * 4, 20)
    odd, _ = given_splits(DataLoader(whole, sampler=weighted), Pairs(LABELS, apart=0.5), shape=SHAPE)
    assert {p for p, _ in seen(odd)} <= {0, 2, 4, 6} and len(odd) == len({p for p, _ in seen(odd)})


def test_without_held_out_images_a_fifth_is_held_out_and_none_is_in_both():
    train, val = given_splits(Pairs([0, 1] * 10), shape=SHAPE, seed=3)
    ours, theirs = ({p for p, _ in seen(part)} for part in (train, val))
    assert len(ours) == 16 and len(theirs) == 4 and not ours & theirs
    assert all(label == position % 2 for position, label in seen(train) + seen(val))


def test_names_of_classes_number_both_splits_by_the_training_sets_order():
    train = Pairs([0, 1, 2], ["zebra", "ant", "mole"])
    val = Pairs([0, 1, 1], ["mole", "zebra"], apart=0.5)
    one, two = given_splits(Subset(train, [0, 1, 2]), DataLoader(val), shape=SHAPE, head_classes=3)
    assert one.classes == two.classes == ("zebra", "ant", "mole")
    assert [label for _, label in seen(one)] == [0, 1, 2] and [label for _, label in seen(two)] == [2, 0, 0]


NAMES = ["zebra", "ant", "mole"]


@pytest.mark.parametrize("named", [0, 1])
def test_labels_without_names_are_positions_in_the_named_sets_classes(named):
    """As they are where the same images are evaluated later; a label beyond the names is none of them."""
    splits = [Pairs([0, 1, 2, 2], NAMES if named == 0 else None), Pairs([2, 0, 3], NAMES if named == 1 else None, apart=0.5)]
    splits[named].labels = [label % 3 for label in splits[named].labels]
    one, two = given_splits(*splits, shape=SHAPE, head_classes=3)
    assert one.classes == two.classes == ("zebra", "ant", "mole") and one.labels == [0, 1, 2, 2]
    assert two.labels == ([2, 0, -1] if named == 0 else [2, 0, 0])
    assert any("has no class names: its labels are taken as positions" in note for note in one.notes)
    later = given_images(splits[1], shape=SHAPE, classes=one.classes, head_classes=3)
    assert later.labels == two.labels


def test_joined_datasets_have_the_names_that_they_share():
    joined = ConcatDataset([Pairs([0, 1], NAMES), Pairs([2], NAMES, apart=0.5)])
    assert given_images(DataLoader(joined), shape=SHAPE, classes=["mole", "ant", "zebra"]).labels == [2, 1, 0]
    unlike = ConcatDataset([Pairs([0, 1], ["ant", "bee"]), Pairs([0, 1], ["bee", "ant"], apart=0.5)])
    part = Subset(unlike, [0])
    for give in (lambda: given_splits(unlike, shape=SHAPE), lambda: given_images(part, shape=SHAPE, classes=["ant", "bee"])):
        with pytest.raises(UserError, match="joins datasets of different classes, 'ant', 'bee' and 'bee', 'ant'"):
            give()


def test_labels_stand_for_their_numbers_in_a_larger_head():
    train, val = given_splits(Pairs([1, 3, 3, 1]), Pairs([3], apart=0.5), shape=SHAPE, head_classes=6)
    assert [label for _, label in seen(train)] == [1, 3, 3, 1] and seen(val) == [(0, 3)] and len(train.classes) == 6


def test_targets_of_torchvision_save_reading_unless_something_transforms_them():
    class Folder(Pairs):
        targets, transforms, target_transform = LABELS, "as torchvision has it", None

    quick = Folder(LABELS)
    train, _ = given_splits(quick, Pairs(LABELS, apart=0.5), shape=SHAPE)
    assert isinstance(train, DatasetSet) and quick.reads == 1 + 2 * 8 and train.labels == LABELS
    moved = Folder([2 - label for label in LABELS])
    moved.target_transform = lambda label: 2 - label
    train, _ = given_splits(moved, Pairs(LABELS, apart=0.5), shape=SHAPE)
    assert train.labels == [2 - label for label in LABELS]
    with pytest.raises(UserError, match=r"has the label 0, and had 1 before"):
        given_splits(Folder([0] * 8), Pairs(LABELS, apart=0.5), shape=SHAPE)


def test_names_are_not_those_of_transformed_labels():
    class Folder(Pairs):
        target_transform = staticmethod(lambda label: 2 - label)

    train, val = Folder([0, 1, 2], ["ant", "bee", "cat"]), Folder([2, 1], ["ant", "bee", "cat"], apart=0.5)
    for wrap in (lambda d: d, DataLoader, lambda d: Subset(d, [0, 1]), lambda d: DataLoader(ConcatDataset([d, d]))):
        one, two = given_splits(wrap(train), wrap(val), shape=SHAPE, head_classes=3)
        assert one.classes == two.classes == ("0", "1", "2")
        assert any("target_transform, so its class names are not taken" in note for note in one.notes)
    named = given_images(val, shape=SHAPE, classes=["cat", "bee", "ant"])
    assert named.classes == ("cat", "bee", "ant") and named.labels == [2, 1], "the user names the labels themselves"


def test_images_without_labels_have_none():
    train, val = given_splits([torch.zeros(4, *SHAPE)], (torch.ones(*SHAPE) for _ in range(2)), shape=SHAPE)
    assert train.labels == [-1] * 4 and val.labels == [-1] * 2 and not train.labelled


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("photos", "images came as 'photos'"),
        (7, "images came as int"),
        (Pairs(LABELS, size=9), "yields images of 3 x 9 x 9, the model takes 3 x 8 x 8"),
        ([(torch.zeros(2, *SHAPE, dtype=torch.uint8), torch.zeros(2))], "torch.uint8 tensors; expected float tensors"),
        ([(torch.zeros(2, *SHAPE), torch.zeros(2))], "yields the label"),
        ([(torch.zeros(2, *SHAPE), torch.zeros(2, 3, dtype=torch.int64))], "yields the label"),
        ([(torch.zeros(2, *SHAPE), torch.zeros(3, dtype=torch.int64))], "yields 2 images with 3 labels"),
        ([(torch.zeros(2, *SHAPE), torch.zeros(2), "path")], "yields tuple of 3"),
        ([{"pixels": torch.zeros(2, *SHAPE)}], "yields images as NoneType"),
        ([], "has no images"),
        (Pairs([]), "has no images"),
    ],
)  # fmt: skip
def test_what_is_none_of_these_is_refused(given, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        given_splits(given, Pairs(LABELS), shape=SHAPE)


def test_more_than_memory_holds_is_refused(monkeypatch):
    monkeypatch.setattr("moee.given.images.MAX_BYTES", 4 * 3 * 8 * 8 * 10)
    with pytest.raises(UserError, match="kept in memory"):
        given_splits((torch.zeros(4, *SHAPE) for _ in range(4)), Pairs(LABELS), shape=SHAPE)


PIXELS = torch.arange(8.0).view(8, 1, 1, 1).expand(8, *SHAPE).clone()


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        (lambda d: d, lambda d: d, "are the training images"),
        (lambda d: d, lambda d: DataLoader(d), "are the training images"),
        (lambda d: DataLoader(d, shuffle=True), lambda d: DataLoader(d), "are the training images"),
        (lambda d: Subset(d, range(6)), lambda d: Subset(d, [5, 6, 7]), "1 of the 3 held-out images are training images"),
        (lambda d: DataLoader(Subset(Subset(d, range(2, 8)), [0, 1])), lambda d: Subset(d, [1, -6]), "1 of the 2"),
        (lambda d: ConcatDataset([Pairs(LABELS, apart=0.3), d]), lambda d: Subset(d, [0, 1]), "are the training images"),
        (lambda d: DataLoader(d, collate_fn=default_collate_of_ones_own), lambda d: Subset(d, [0]), "are the training images"),
        (lambda d: (PIXELS, torch.tensor(LABELS)), lambda d: (PIXELS, torch.tensor(LABELS)), "are the training images"),
        (lambda d: TensorDataset(PIXELS, torch.tensor(LABELS)), lambda d: (PIXELS[2:4], torch.tensor([2, 1])), "are the trai"),
        (lambda d: d, lambda d: Pairs(LABELS[:3]), "every held-out image is byte by byte a training image"),
    ],
)
def test_training_images_are_no_held_out_images(train, val, said):
    data = Pairs(LABELS)
    with pytest.raises(UserError, match=said):
        given_splits(train(data), val(data), shape=SHAPE)


def default_collate_of_ones_own(items):
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def test_files_are_the_same_whatever_transforms_them():
    class Folder(Pairs):
        targets, transforms = LABELS, "as torchvision has it"

        def __init__(self, names, **more):
            super().__init__(LABELS, **more)
            self.samples = [(f"photos/{name}.jpg", 0) for name in names]

    with pytest.raises(UserError, match="1 of the 8 held-out images are training images"):
        given_splits(Folder("abcdefgh"), Folder("hijklmno", apart=0.5), shape=SHAPE)
    given_splits(Folder("abcdefgh"), Folder("ijklmnop", apart=0.5), shape=SHAPE)


def test_some_images_that_are_in_both_are_said():
    shifted = PIXELS[6:] + torch.tensor([0, 9.0]).view(2, 1, 1, 1)
    train, _ = given_splits(Pairs(LABELS), (shifted, torch.tensor([0, 1])), shape=SHAPE)
    assert "1 of the 2 held-out images is byte by byte among the training images" in train.notes
    halves = random_split(Pairs(LABELS), [6, 2])
    assert not given_splits(*halves, shape=SHAPE)[0].notes


class Shaken(Pairs):
    """Images with noise that is drawn at every read: of torch, NumPy and Python, or of a generator of the dataset's own."""

    def __init__(self, labels, own=None, **more):
        super().__init__(labels, **more)
        self.own = own

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        drawn = torch.rand(()) + random.random() + np.random.rand()
        return image + (drawn if self.own is None else torch.rand((), generator=self.own)), label


def test_what_a_transform_draws_is_drawn_the_same_at_every_read():
    torch.manual_seed(1)
    before = torch.random.get_rng_state(), random.getstate()
    train, val = given_splits(Shaken(LABELS), Shaken(LABELS, apart=20), shape=SHAPE)
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()
    for data in (train, val, given_splits(Shaken([0, 1] * 5), shape=SHAPE)[1], given_images(Shaken(LABELS), shape=SHAPE)):
        first, again = (torch.cat([b.images for b in batches(data, 4)]) for _ in range(2))
        assert torch.equal(first, again) and len(first[:, 0, 0, 0].frac().unique()) > 1


def test_held_out_images_that_never_stay_the_same_are_refused():
    moving = Shaken(LABELS, own=torch.Generator(), apart=20)
    for call in (lambda: given_splits(Pairs(LABELS), moving, shape=SHAPE), lambda: given_images(moving, shape=SHAPE),
                 lambda: given_splits(moving, shape=SHAPE)):  # fmt: skip
        with pytest.raises(UserError, match=r"Shaken\[0\] is another image at each read, so two models would be compared"):
            call()
    train, _ = given_splits(moving, Pairs(LABELS), shape=SHAPE)
    assert any("is another image at each read, and tuning matches" in note for note in train.notes)


def test_a_fifth_that_holds_copies_of_the_rest_says_so_or_is_refused():
    stream = Pairs([0, 1] * 10)  # of which a second worker gives a part again
    notes = given_splits([batch(stream, range(20)), batch(stream, range(10))], shape=SHAPE)[0].notes
    assert any("held-out images are byte by byte among the training images" in note for note in notes)
    with pytest.raises(UserError, match="every held-out image is byte by byte a training image"):
        given_splits(ConcatDataset([Pairs([0, 0, 0, 0, 0])] * 9), shape=SHAPE)


def test_a_set_of_ours_is_taken_as_it_is():
    own = TensorSet("own", torch.zeros(4, *SHAPE), [0, 1, 0, 1], ["a", "b"])
    train, _ = given_splits(own, TensorSet("other", torch.ones(2, *SHAPE), [1, 0], ["b", "a"]), shape=SHAPE)
    assert train.classes == ("a", "b") and train.labels == [0, 1, 0, 1]


class Scaling(DataLoader):
    """A loader that changes what its dataset gives, after it."""

    def __iter__(self):
        return ((images * 2, labels) for images, labels in super().__iter__())


class Endless(Sampler):
    def __init__(self, positions):
        self.positions = positions

    def __iter__(self):
        return itertools.cycle(self.positions)

    def __len__(self):
        return len(self.positions)


class Rarely(Pairs):
    """Its last image is another one from the third read on."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image + 1 if index == 5 and self.reads > 40 else image), label


class Breaking(Pairs):
    def __init__(self, labels, error):
        super().__init__(labels)
        self.error = error

    def __getitem__(self, index):
        if index == 2:
            raise self.error
        return super().__getitem__(index)


def test_a_loader_that_changes_what_its_dataset_gives_is_read_as_it_gives():
    data = given_images(Scaling(Pairs(LABELS), batch_size=3), shape=SHAPE)
    assert [position for position, _ in seen(data)] == [2 * i for i in range(len(LABELS))]


def test_a_sampler_without_an_end_ends():
    data = given_images(DataLoader(Pairs(LABELS), batch_size=3, sampler=Endless(range(8))), shape=SHAPE)
    assert seen(data) == expected(LABELS)
    with pytest.raises(UserError, match="sampler of python:Pairs does not end"):
        given_images(DataLoader(Pairs(LABELS), batch_size=3, sampler=Endless(range(4))), shape=SHAPE)


def test_a_held_out_image_that_changes_later_is_an_error():
    data = given_images(Rarely(LABELS), shape=SHAPE)
    with pytest.raises(UserError, match=r"Rarely\[5\] is another image at each read; two models would be compared"):
        for _ in range(4):
            seen(data)


def test_an_image_that_cannot_be_decoded_is_skipped_and_one_of_another_size_is_named():
    data = given_images(Breaking(LABELS, OSError("truncated")), shape=SHAPE)
    assert [position for position, _ in seen(data)] == [0, 1, 3, 4, 5, 6, 7] and list(data.skipped) == [2]
    with pytest.raises(UserError, match=r"python:Breaking\[2\] raised KeyError: 'row'"):
        given_images(Breaking(LABELS, KeyError("row")), shape=SHAPE)
    odd = [(torch.zeros(SHAPE), 0), (torch.zeros(3, 9, 9), 1)]
    with pytest.raises(UserError, match=r"yields images of 3 x 9 x 9, the model takes 3 x 8 x 8"):
        given_images(ConcatDataset([odd]), shape=SHAPE)


def test_other_names_of_labels_gradients_and_repetitions():
    items = [{"image": torch.full(SHAPE, float(i), requires_grad=True), "target": label} for i, label in enumerate(LABELS)]
    assert seen(given_images(ConcatDataset([items]), shape=SHAPE)) == expected(LABELS)
    both = given_images([batch(Pairs(LABELS), range(8))] * 2, shape=SHAPE)  # as two workers of a stream give it
    assert "8 of the 16 held-out images are there before, byte by byte, so intervals come out too narrow" in both.notes
