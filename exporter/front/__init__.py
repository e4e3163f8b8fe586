"""The front of a plan as a picture: quality over time and over size, every candidate a mark.

A `plan.json` comes in; SVG, for a page or as a file, goes out.
Imports moee and markup.
"""

from exporter.front.picture import LEGEND, panels, sheet, table_rows
from exporter.front.points import Candidate, Front, read_front
from exporter.front.write import write_front

__all__ = ["LEGEND", "Candidate", "Front", "panels", "read_front", "sheet", "table_rows", "write_front"]
