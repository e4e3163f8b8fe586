"""`moee verify`: parity, routes, accuracy and engines in one verdict, and the files that a CI job reads.

An export, its model and images come in; a result, JUnit XML and Markdown go out.
Imports moee, plugins, engines, runners, graph, parity and ship.
"""

from exporter.verification.accuracy import AccuracyResult, compare_accuracy
from exporter.verification.result import Case, VerifyResult
from exporter.verification.suite import verify

__all__ = ["AccuracyResult", "Case", "VerifyResult", "compare_accuracy", "verify"]
