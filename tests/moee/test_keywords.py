"""Flags in the sentences of errors become the keywords of the function that was called."""

import pytest

from moee.errors import NothingRouted, UserError
from moee.keywords import in_python


@in_python(["keep"], {"random_weights": "seed", "std": "std of input=", "side": "input={1}"})
def call(said, pretrained=False, num_classes=None, img_size=None, checkpoint=None, kind=UserError):
    raise kind(said)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("give --pretrained, or --checkpoint FILE for yours", "give pretrained=True, or checkpoint=FILE for yours"),
        ("or --random-weights SEED to draw them", "or seed=SEED to draw them"),
        ("--keep: Input should be at most 1 (came 2)", "keep: Input should be at most 1 (came 2)"),
        ("--std.0: Input should be greater than 0", "std of input=: Input should be greater than 0"),
        ("give --img-size H W, or one number for both", "give img_size=(H, W)"),
        ("give --side H W", "give input={1}"),
        ("--num-classes 0 says that they are features", "num_classes=0 says that they are features"),
        ("it has 4, --num-classes says 7", "it has 4, num_classes says 7"),
        ("add --no-trial-export to go on", "add --no-trial-export to go on"),
    ],
)
def test_a_flag_becomes_the_keyword_if_there_is_one(said, expected):
    with pytest.raises(UserError) as caught:
        call(said)
    assert str(caught.value) == expected


def test_the_kind_of_the_error_stays():
    with pytest.raises(NothingRouted, match="keep: too small"):
        call("--keep: too small", kind=NothingRouted)
    assert call.__name__ == "call"
