"""Random inputs for readers: each loads or is refused in one sentence. A few by default, 10,000 under `slow`."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moee.errors import UserError

FEW, MANY = 60, 10_000
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
MAX_SENTENCE = 2000
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(["..", "/etc/passwd", "a\0b", "\ud800", 2**70, -1, 10**400, float("nan"), "\x1b[2J", "a\nb", "x" * 5000,
                       [[[[[[]]]]]], [0] * 1000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6,
)  # fmt: skip


def fuzz(count: int, *strategies):
    """Hypothesis with `count` inputs; the same ones in every run."""

    def decorate(test):
        checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
        settled = settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=checks, database=None)
        settled(given(*strategies)(test))()

    return decorate


def is_sentence(error: Exception) -> bool:
    """One line that a terminal may show: short, without control characters."""
    text = str(error)
    return 0 < len(text) < MAX_SENTENCE and all(c.isprintable() for c in text)


def accepts_or_refuses(load, *arguments) -> bool:
    """True if it loads. Anything but success and one sentence fails the test."""
    try:
        load(*arguments)
    except UserError as error:
        assert is_sentence(error), repr(str(error))
        return False
    return True


def places(body, path=()):
    """Every position in a JSON value."""
    yield path
    children = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in children:
        yield from places(value, (*path, key))


def replaced(body, path, value):
    """A copy of `body` with `value` at a position."""
    if not path:
        return value
    copy = dict(body) if isinstance(body, dict) else list(body)
    copy[path[0]] = replaced(body[path[0]], path[1:], value)
    return copy


def damaged(body):
    """Strategy: the text of `body` with one to three values replaced, left out or added, and now and then cut short."""
    spots = [p for p in places(body) if p]

    @st.composite
    def draw_text(draw):
        result = body
        for _ in range(draw(st.integers(1, 3))):
            spot, value = draw(st.sampled_from(spots)), draw(JSON)
            try:
                result = replaced(result, spot, value)
            except (KeyError, IndexError, TypeError):  # an earlier change took the place away
                continue
        text = json.dumps(result)
        return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 15)) == 0 else text

    return draw_text()
