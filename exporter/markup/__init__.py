"""HTML and SVG as text that nobody's names can break, and figures as people read them.

Values of any kind come in; markup goes out.
Imports no other room.
"""

from exporter.markup.elements import Html, join, raw_text_element, table, tag

__all__ = ["Html", "join", "raw_text_element", "table", "tag"]
