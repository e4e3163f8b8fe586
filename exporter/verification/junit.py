"""JUnit XML of a verification, in the form that Jenkins, GitLab and GitHub's test reporters read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime

from exporter.verification.result import Case, VerifyResult

NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd]")


def to_junit(result: VerifyResult, when: datetime | None = None) -> str:
    """One suite, one case a check. Element and attribute order follow the JUnit 10 schema of Jenkins' xUnit plugin."""
    described = {"runtime": result.parity.runtime, "precision": result.parity.precision}
    return _document(result.export, result.cases(), described, result.seconds, when)


def error_junit(export: str, error: Exception, seconds: float, when: datetime | None = None) -> str:
    """The report of a verification that could not run: one case, an error of `error`'s type."""
    case = Case("run", "verify", error=f"{type(error).__name__}: {error}")
    return _document(export, [case], {}, seconds, when)


def _document(export: str, cases: list[Case], described: dict[str, str], seconds: float, when: datetime | None) -> str:
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(c.failure is not None for c in cases)),
        "errors": str(sum(c.error is not None for c in cases)),
        "skipped": str(sum(c.skipped is not None for c in cases)),
        "time": f"{seconds:.3f}",
    }
    root = ET.Element("testsuites", {"name": "moee verify", **counts})
    stamp = (when or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%S")
    suite = ET.SubElement(root, "testsuite", {"name": _clean(f"moee.verify.{export}"), "timestamp": stamp, **counts})
    properties = ET.SubElement(suite, "properties") if described else suite
    for name, value in described.items():
        ET.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for case in cases:
        attributes = {"name": _clean(case.name), "classname": f"moee.verify.{case.group}", "time": "0.000"}
        element = ET.SubElement(suite, "testcase", attributes)
        if case.skipped is not None:
            ET.SubElement(element, "skipped", {"message": _clean(case.skipped)})
        elif case.error is not None:
            broken = ET.SubElement(element, "error", {"message": _clean(case.error), "type": case.error.partition(":")[0]})
            broken.text = _clean(case.error)
        elif case.failure is not None:
            failure = ET.SubElement(element, "failure", {"message": _clean(case.failure), "type": case.group})
            failure.text = _clean(case.failure)
        if case.detail:
            ET.SubElement(element, "system-out").text = _clean(case.detail)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False).join(('<?xml version="1.0" encoding="UTF-8"?>\n', "\n"))


def _clean(text: str) -> str:
    return NOT_XML.sub("?", text)
