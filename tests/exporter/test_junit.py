"""junit.xml against a schema: passing, failing and erroring reports hold to it, and broken ones do not."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from exporter.verification import Case, verify
from exporter.verification.junit import _document, error_junit, to_junit
from exporter.verification.markdown import to_markdown
from moee.errors import MissingDependency
from tests.exporter import damage

XSD = Path(__file__).with_name("junit.xsd")
LAYER = "blocks.1.mlp"


@pytest.fixture(scope="module")
def schema():
    return pytest.importorskip("xmlschema", reason="needs the extra dev").XMLSchema(XSD)


def checked(schema, text: str) -> ET.Element:
    """The report's root: it holds to the schema, and its counts are those of its cases, which XSD 1.0 cannot say."""
    schema.validate(text)
    root = ET.fromstring(text)
    for suite in [root, *root]:
        cases = list(suite.iter("testcase"))
        assert int(suite.get("tests")) == len(cases)
        for kind, key in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(suite.get(key)) == sum(c.find(kind) is not None for c in cases)
    return root


def test_passing_and_failing_reports(schema, tiny_export, tmp_path):
    passing = verify(tiny_export.folder(), tiny_export.moee, tiny_export.data, sizes=(2,))
    root = checked(schema, to_junit(passing))
    assert passing and root.get("failures") == "0" and int(root.get("tests")) > 9
    folder = tiny_export.copy(tmp_path / "export")
    damage.change_store(folder, LAYER, "router_bias", lambda b: b[::-1])
    failing = verify(folder, tiny_export.moee, tiny_export.data, sizes=(2,), images=0)
    root = checked(schema, to_junit(failing))
    failed = {(c.get("classname"), c.get("name")) for c in root.iter("testcase") if c.find("failure") is not None}
    assert {("moee.verify.routes", LAYER), ("moee.verify.weights", LAYER)} <= failed
    assert [c.get("classname") for c in root.iter("testcase") if c.find("skipped") is not None] == ["moee.verify.accuracy"]
    summary = to_markdown(failing)
    assert "## moee verify: FAILED" in summary and f"**{LAYER}**" in summary


def test_erroring_report(schema):
    error = MissingDependency("plugin library <x> is missing\x00; run \"moee build\" & try again")
    root = checked(schema, error_junit("ex\x01port", error, 0.25))
    (broken,) = root.iter("error")
    assert broken.get("type") == "MissingDependency" and "<x> is missing?; run" in broken.get("message")
    assert root.get("errors") == "1" and root[0].get("name") == "moee.verify.ex?port"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('classname="moee.verify.a"', 'class="moee.verify.a"'),  # an attribute of another name
        ('name="one" ', ""),  # a missing one
        ('name="two"', 'name="one"'),  # the same case twice
        ('failures="1"', 'failures="one"'),  # a count that is no number
        ('time="0.000"', 'time="-1"'),
        ("<failure", "<failed"),  # an unknown element
        ("</testcase>", "<skipped/></testcase>"),  # two outcomes, or one behind the output
        ("</testsuites>", "</testsuite>"),  # not even XML
        ("2026-01-02T03:04:05", "yesterday"),
    ],
)
def test_broken_reports_are_refused(schema, old, new):
    from datetime import datetime

    cases = [Case("a", "one", "said"), Case("a", "two", failure="off by 3"), Case("a", "three", skipped="no labels")]
    text = _document("x", cases, {"runtime": "cpu"}, 1.0, datetime(2026, 1, 2, 3, 4, 5))
    checked(schema, text)
    assert old in text
    import xmlschema

    with pytest.raises((xmlschema.XMLSchemaException, ET.ParseError)):
        schema.validate(text.replace(old, new))
