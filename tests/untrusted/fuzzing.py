"""Random inputs for readers: each loads or is refused in one sentence. A few by default, 10,000 under `slow`."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moee.errors import UserError

FEW, MANY = 60, 10_000
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(["..", "/etc/passwd", "a\0b", "\ud800", 2**70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6,
)  # fmt: skip


def fuzz(count: int, *strategies):
    """Hypothesis with `count` inputs; the same ones in every run."""

    def decorate(test):
        checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
        settled = settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=checks, database=None)
        settled(given(*strategies)(test))()

    return decorate


def accepts_or_refuses(load, *arguments) -> bool:
    """True if it loads. Anything but success and one sentence fails the test."""
    try:
        load(*arguments)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    return True
