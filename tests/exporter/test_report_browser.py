"""The report in headless Chromium: no error, no request, no sideways scrolling, and the keyboard reaches everything."""

import pytest

from exporter.report import write_report
from tests.exporter.browser import BINARY, Browser
from tests.exporter.report_data import EVIL, write_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BINARY is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture
def page(tmp_path):
    run = write_run(tmp_path / "run", model=EVIL)
    (run / "plot.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'><script>alert(1)</script></svg>")
    return write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize(("width", "phone", "dark"), [(1280, False, False), (1280, False, True), (390, True, False)])
def test_it_renders_clean_and_fits(page, tmp_path, width, phone, dark):
    with Browser(tmp_path / "profile") as browser:
        browser.open(page, width, dark=dark, phone=phone)
        assert browser.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        ink, paper = (browser.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
        assert ink != paper and (paper == "rgb(255, 255, 255)") is not dark
        small = browser.run("[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width < 100).length")
        assert small == 0, f"{small} drawings are narrower than 100 px"
        heights = browser.run("[...document.querySelectorAll('svg.front text')].map(t => t.getBoundingClientRect().height)")
        assert len(heights) > 30 and min(heights) >= 10, "text of a front is too small to read"
        loaded = browser.run("[...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 0])")
        assert len(loaded) == 5 and all(fine for _, fine in loaded), loaded
        assert browser.console == [], browser.console
        assert {r.partition(":")[0] for r in browser.requests} <= {"file", "data"}
        assert [r for r in browser.requests if r.startswith("file")] == [page.resolve().as_uri()]


def test_the_keyboard_reaches_the_table_and_sorts_it(page, tmp_path):
    column = "[...document.querySelectorAll('#layers tbody tr')].map(r => r.cells[4].textContent)"
    head = "document.querySelectorAll('#layers th[scope=col]')[4].getAttribute('aria-sort')"
    focus = "document.activeElement.closest('#layers') ? document.activeElement.textContent : ''"
    with Browser(tmp_path / "profile") as browser:
        browser.open(page, 1200)
        browser.key("Tab")
        assert browser.run("document.activeElement.className") == "skip"
        for _ in range(100):
            if browser.run(focus) == "kept by any":
                break
            browser.key("Tab")
        assert browser.run(focus) == "kept by any", "Tab never came to the column's button"
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is not visible"
        assert browser.run(column) == ["100", "9", "50"] and browser.run(head) == "none"
        browser.key("Enter")
        assert browser.run(column) == ["9", "50", "100"] and browser.run(head) == "ascending"
        browser.key("Enter")
        assert browser.run(column) == ["100", "50", "9"] and browser.run(head) == "descending"
        assert browser.console == []


def test_a_script_that_is_not_ours_is_refused(page, tmp_path):
    """The policy is what it says: a planted script does not run, and the console names the refusal."""
    planted = tmp_path / "planted.html"
    planted.write_text(page.read_text().replace("</main>", "<script>document.title = 'planted'</script></main>"))
    with Browser(tmp_path / "profile") as browser:
        browser.open(planted, 1200)
        assert browser.run("document.title") != "planted"
        assert any("Content Security Policy" in line for line in browser.console)
