"""What a verification leaves: parity.json, JUnit XML and Markdown in a folder, or parity.json alone."""

from __future__ import annotations

from exporter.verification.junit import to_junit
from exporter.verification.markdown import to_markdown
from exporter.verification.result import VerifyResult
from moee.places.output_file import OutputFile
from moee.places.output_folder import OutputFolder
from moee.store.artifact import write_manifest


def write_result(output: OutputFolder | OutputFile, result: VerifyResult) -> None:
    """Write parity.json, and beside it junit.xml and summary.md where `output` is a folder."""
    body = result.to_json()
    if isinstance(output, OutputFile):
        output.write_json(body)
        return
    with output.write() as folder:
        (folder / "junit.xml").write_text(to_junit(result), encoding="utf-8")
        (folder / "summary.md").write_text(to_markdown(result), encoding="utf-8")
        write_manifest(folder, "parity.json", body.pop("schema"), body)
