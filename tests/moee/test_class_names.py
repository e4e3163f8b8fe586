"""Class numbers come from names: which mapping fits a head, and what is said about a guess."""

import pytest
from timm.data import ImageNetInfo

from moee.data.class_names import MAX_CLASSES, Labels, class_name, listed, number_classes
from moee.natural_order import natural_key

FULL = {"cat": 5, "dog": 5, "tulip": 5}


@pytest.mark.parametrize(
    ("train", "val", "empty", "head", "expected", "said"),
    [
        (FULL, {"dog": 2}, (), 3, ("cat", "dog", "tulip"), ""),
        (FULL, FULL, ("apple",), 3, ("cat", "dog", "tulip"), ""),
        ({"cat": 5, "tulip": 5}, FULL, (), 3, ("cat", "dog", "tulip"), "over train and val together, since the model has 3"),
        ({"cat": 5, "tulip": 5}, {"cat": 1}, ("dog",), 3, ("cat", "dog", "tulip"), "those without images included"),
        (FULL, FULL, (), None, ("cat", "dog", "tulip"), ""),
        ({"cat": 5, "tulip": 5}, FULL, ("bear",), None, ("cat", "tulip"), ""),
        (FULL, FULL, (), 1000, ("cat", "dog", "tulip"), ""),
        ({"cat": 5, "dog": 5}, {"cat": 1, "dog": 1}, (), 2, ("cat", "dog"), ""),
        ({"1": 1, "10": 1, "2": 1}, {}, (), 3, ("1", "2", "10"), "natural order"),
        ({"all": 9}, {"all": 3}, (), None, (), ""),
        ({}, {}, (), 3, (), ""),
    ],
)
def test_the_first_selection_that_fits_the_head(train, val, empty, head, expected, said):
    found = number_classes(train, val, empty, head)
    assert found.classes == expected
    assert said in " ".join(found.notes) if said else not found.notes


@pytest.mark.parametrize("head", [1000, 11821, 21841, 21842])
def test_synsets_are_numbered_as_in_their_imagenet(head):
    names = ["n01440764", "n02123045", "n07753592", "n03000684", "n02056570"]
    found = number_classes(dict.fromkeys(names[:4], 3), dict.fromkeys(names[1:], 2), (), head)
    assert len(found.classes) == head and "ImageNet synsets" in found.notes[0] and "5 of" in found.notes[0]
    number = Labels(found.classes).number
    assert len({number(name) for name in names} - {-1}) == 5
    if head == 1000:
        info = ImageNetInfo()
        assert all(info.index_to_label_name(number(name)) == name for name in names)
        assert number("n01440764") == 0 and number("n02056570") == 145  # king penguin
    assert number("background") == -1


def test_synsets_beside_another_folder_under_the_whole_head():
    assert len(number_classes({"n01440764": 3, "misc": 3}, {}, (), 1000).classes) == 1000
    assert number_classes({"n01440764": 3, "misc": 3}, {}, (), 2).classes == ("misc", "n01440764")
    assert number_classes({"n01440764": 3, "n02123045": 3}, {}).classes == ("n01440764", "n02123045")


def test_numbers_stand_for_themselves_where_some_lack():
    found = number_classes({"0": 3, "7": 3}, {"9": 1}, (), 12)
    assert found.classes == tuple(map(str, range(12))) and "names are numbers" in found.notes[0]
    assert number_classes({"000": 3, "007": 3}, {}, (), 12).classes[:2] == ("000", "001")
    # 1 to 12 with some missing may start at 1 in the head: no guess
    assert number_classes({"1": 3, "7": 3}, {}, (), 12).classes == ("1", "7")
    assert number_classes({"1": 3, "7": 3}, {}, (), 12, indices=True).classes == tuple(map(str, range(12)))
    assert number_classes({"1": 3, "2": 3}, {"3": 1}, (), 3, indices=True).classes == ("1", "2", "3")


def test_numbers_that_are_given_others_are_said():
    found = number_classes({"1": 3, "2": 3, "5": 3}, {}, (), 3, indices=True)
    assert found.classes == ("1", "2", "5")
    assert found.notes == ("class numbers '1', '2', '5' are not 0 to 2: in this order they are taken as the model's 3 classes",)
    assert not number_classes({"0": 3, "1": 3, "2": 3}, {}, (), 3, indices=True).notes


def test_two_spellings_of_one_name_count_once():
    composed, apart = "caf\u00e9", "cafe\u0301"
    for train, val, empty in (({composed: 2, "tea": 2}, {apart: 1}, ()), ({composed: 2, apart: 1, "tea": 2}, {}, (apart,))):
        assert number_classes(train, val, empty, 2).classes == (composed, "tea")
        assert number_classes(train, val, empty, 3).classes == (composed, "tea")
    assert number_classes({apart: 2, "tea": 2}, {}, (), 2, order=("tea", composed)).classes == ("tea", apart)


def test_a_source_with_an_order_of_its_own_keeps_it():
    order = ("trouser", "bag", "ankle boot")
    assert number_classes({"bag": 1, "trouser": 1}, {"bag": 1}, (), 3, order=order).classes == order
    assert number_classes({"bag": 1, "trouser": 1}, {"bag": 1}, order=order).classes == ("trouser", "bag")


def test_more_classes_than_any_model_has_count_as_none():
    found = number_classes({str(i): 1 for i in range(MAX_CLASSES + 1)}, {})
    assert not found.classes and "unlabelled" in found.notes[0]


def test_names_as_file_systems_have_them():
    number = Labels(["caf\u00e9", "[x] y", "日本"]).number
    assert [number("cafe\u0301"), number("[x] y"), number("日本"), number("cafe")] == [0, 1, 2, -1]
    assert class_name("a\nb\x1b[31m\u202e\udce9") == "a\\nb\\x1b[31m\\u202e\\udce9"
    assert class_name("日本 [x]") == "日本 [x]"
    long = {class_name("x" * 300), class_name("x" * 301), class_name("\udce9" * 255)}
    assert len(long) == 3 and {len(name) for name in long} == {255}
    assert sorted(["10", "2", "b", "A", "²", "a"], key=natural_key) == ["2", "10", "A", "a", "b", "²"]
    assert listed(list("abcde")) == "'a', 'b', 'c' and 2 more"
