"""Numbers from Python are held to the command line's bounds."""

import math

import numpy as np
import pytest

from moee.bounds import BATCH, DROP, IMAGES, real, several, whole
from moee.errors import UserError


@pytest.mark.parametrize("value", [-1, 3.5, True, "3", None, math.nan, 2**40])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(UserError, match="images: expected a whole number from 0"):
        whole("images", value, IMAGES)


@pytest.mark.parametrize("value", [-1, 101, math.inf, math.nan, True, "2", None])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(UserError, match="max_drop: expected a number from 0 to 100"):
        real("max_drop", value, DROP)


@pytest.mark.parametrize("values", [(), (0,), (2.5,), 8, "12", [1, True]])
def test_what_are_no_batches_is_refused(values):
    with pytest.raises(UserError, match="sizes: expected"):
        several("sizes", values, BATCH)


def test_numbers_within_the_bounds_are_taken_numpys_too():
    assert whole("images", np.int64(3), IMAGES) == 3 and several("sizes", [1, np.int32(8)], BATCH) == (1, 8)
    assert real("max_drop", 0, DROP) == 0 and real("max_drop", np.float32(0.5), DROP) == 0.5
