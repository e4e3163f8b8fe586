"""The site that `make docs` builds from these pages. Its table of contents are the lists of links in index.md."""

import re

project, author = "moee", "the authors of moee"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["**/*.jsonl"]
myst_heading_anchors = 4  # links to headings work as on the pages themselves
suppress_warnings = ["myst.header"]  # a page may begin a section at the third level
html_theme = "furo"
html_title = "moee"
html_show_sphinx = html_show_copyright = html_copy_source = html_show_sourcelink = False

SECTION = re.compile(r"^## (.+)$|^- \[([^\]]+)\]\(([^)]+)\.md\)", re.MULTILINE)
API = '```{raw} html\n<p><a href="api/index.html">API reference</a>, from the docstrings</p>\n```\n'


def contents(text):
    """The text of index.md with a hidden toctree for each of its lists."""
    trees = []
    for caption, title, page in SECTION.findall(text):
        if caption:
            trees.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n")
        else:
            trees[-1] += f"{title} <{page}>\n"
    return text + "\n" + API + "\n" + "".join(f"{tree}```\n\n" for tree in trees)


def read(app, name, source):
    if name == "index":
        source[0] = contents(source[0])
    out = re.escape("../" * (name.count("/") + 1))
    source[0] = re.sub(rf"\[([^\]]+)\]\({out}[^)]*\)", r"\1", source[0])  # what lies outside of docs/ is no page of the site


def setup(app):
    app.connect("source-read", read)
