"""One self-contained HTML page about a model: what changed, what was kept, whether it agrees, how fast it is.

Files that other commands wrote come in; a page goes out.
Imports moee, markup, front and terminal.
"""

from exporter.report.collect import collect
from exporter.report.page import render, write_report
from exporter.report.sources import Sources

__all__ = ["Sources", "collect", "render", "write_report"]
