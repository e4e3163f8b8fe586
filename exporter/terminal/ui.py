"""What the terminal shows: progress bars on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from exporter.figures import macs_unit, status_of
from moee.artifacts.stages import CHANGED, dense_differs, images_changed
from moee.errors import plain
from moee.measure.accuracy import counted, recorded_interval
from moee.progress import Lines
from moee.schema import data_title

LEAST_WIDTH, UNBOUNDED = 76, 10_000  # characters of a line


class SentenceConsole(Console):
    """Sentences stay whole lines, which a terminal folds itself: what is cut at a width cannot be searched for or copied. No text
    steers the terminal, wherever it came from."""

    def print(self, *objects: Any, **settings: Any) -> None:
        if objects and all(isinstance(thing, str) for thing in objects):
            settings.setdefault("soft_wrap", True)
        if any(isinstance(thing, FittingTable) for thing in objects):
            settings.setdefault("crop", False)
        super().print(*objects, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str("\n".join(map(plain, text.split("\n"))), **settings)


def plain_console(**settings: Any) -> Console:
    """A console that shows text as it is: names of the user's may hold brackets or colons, which rich would read as its markup
    or as the names of pictures."""
    return SentenceConsole(markup=False, emoji=False, **settings)


class ProgressDisplay:
    """A progress reporter for the library. On a terminal a bar a task; otherwise a line at start, end and every 10 s."""

    def __init__(self, console: Console | None = None):
        self.console = console or plain_console(stderr=True)
        self.live = self.console.is_terminal
        self.lines = Lines(self.line)
        self.tasks: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self.console,
        )  # fmt: skip

    def __enter__(self) -> ProgressDisplay:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.progress.stop()

    def line(self, text: str) -> None:
        """A message of a step whose length nobody knows."""
        self.console.print(text, highlight=False)

    def __call__(self, message: str, done: int, total: int) -> None:
        if not self.live:
            self.lines(message, done, total)
            return
        if message not in self.tasks or done == 0:
            self.tasks[message] = self.progress.add_task(message, total=total or None)
        self.progress.update(self.tasks[message], completed=done, total=total or None)


class FittingTable(Table):
    """A table that gives up its frame where the console is narrow. Columns of words (left-justified) are then folded and those of
    numbers never cut. Where that is not enough either, its lines are longer than the console's, which folds them itself."""

    def __init__(self, title: str):
        super().__init__(title=title, min_width=LEAST_WIDTH)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wanted = self.__rich_measure__(console, options.update(max_width=UNBOUNDED)).maximum
        if wanted > options.max_width:
            self.box, self.show_edge, self.padding, self.min_width = SIMPLE, False, (0, 0, 0, 0), None
            for column in self.columns:
                words = column.justify == "left" or any(" " in str(cell) for cell in column.cells)
                column.no_wrap, column.overflow = not words, "fold"
                if column.justify == "right":
                    column.header = str(column.header).replace(" ", "\n")
            least = self.__rich_measure__(console, options.update(max_width=UNBOUNDED)).minimum
            if least > options.max_width:
                options = options.update(width=least, max_width=least)
        return super().__rich_console__(console, options)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def within(value: float | None, interval: Sequence[float] | None) -> str:
    """An accuracy with its 95 % interval."""
    return percent(value) if interval is None else f"{percent(value)} ({span(interval)})"


def span(interval: Sequence[float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def title_of(info: dict[str, Any], model: str, data: str) -> str:
    """A model and its data, with those that it was extracted on if they are others."""
    first = info["stages"].get("extracted", {}).get("data") or data
    return f"{model} on {data_title(data)}" + (f" (extracted on {data_title(first)})" if first != data else "")


def stage_table(info: dict[str, Any], title: str) -> Table:
    """One column for the dense model and one a stage: accuracy with its 95 % interval, cosines, MACs, parameters. Where stages
    were measured on different images, each has the dense model's accuracy on the same in its own column."""
    stages: dict[str, Any] = {name: stage for name, stage in info["stages"].items() if "retention" in stage}  # what was measured
    first = next(iter(stages.values()))
    table = FittingTable(title)
    for column in ("", "dense", *stages):
        table.add_column(column, justify="left" if not column else "right")
    kept = [stage["retention"] for stage in stages.values()]
    measured = any(r.get("accuracy") is not None for r in kept)
    changed = images_changed(stages.values())
    apart = measured and (len({stage.get("data") for stage in stages.values()}) > 1 or changed or dense_differs(stages.values()))

    def figures(key: str) -> list[tuple[str, str]]:
        intervals = [recorded_interval(r, key) for r in kept]
        return [(percent(r.get(key)), "" if i is None else span(i)) for r, i in zip(kept, intervals, strict=True)]

    dense, ours = figures("dense_accuracy"), figures("accuracy")
    if apart:
        for label, found in (("accuracy", ours), ("dense, same images", dense)):
            table.add_row(label, "", *[figure for figure, _ in found])
            table.add_row("  95 % interval", "", *[interval for _, interval in found])
    else:
        table.add_row("accuracy", dense[0][0], *[figure for figure, _ in ours])
        if dense[0][1]:
            table.add_row("  95 % interval", dense[0][1], *[interval for _, interval in ours])
    table.add_row("top-1 agreement", "", *[percent(r["top1_agreement"]) for r in kept])
    table.add_row("class cosine", "", *[number(r["class_cosine"]) for r in kept])
    table.add_row("token cosine", "", *[number(r["token_cosine"]) for r in kept])
    per, letter = macs_unit(first["cost"]["dense"]["macs"])
    for label, key, unit in ((f"MACs ({letter})", "macs", per), ("parameters (M)", "params", 1e6)):
        before = first["cost"]["dense"][key]
        cells = [f"{s['cost']['moee'][key] / unit:.3f} ({s['cost']['moee'][key] / before - 1:+.1%})" for s in stages.values()]
        table.add_row(label, f"{before / unit:.3f}", *cells)
    table.caption = "\n".join([*retention_notes(kept), *[CHANGED] * changed]) or None
    return table


def retention_notes(kept: list[dict[str, Any]]) -> list[str]:
    """What qualifies the figures of a table: of how many images accuracies are, and why one lacks."""
    found = []
    for r in kept:
        if r.get("no_accuracy"):
            found.append(f"accuracy is not compared: {r['no_accuracy']}")
        elif r.get("labelled") is not None and (r["labelled"] != r["images"] or r.get("probe")):
            found.append(f"accuracy on {counted(r['labelled'], r['images'], bool(r.get('probe')))}")
        if r.get("no_tokens"):
            found.append(f"no token cosine: {r['no_tokens']}")
    return list(dict.fromkeys(found))


def layer_notes(layers: list[dict[str, Any]]) -> list[str]:
    """What makes a layer's figures doubtful, one line each; older artifacts say nothing."""
    return [f"{layer['name']}: {note}" for layer in layers for note in layer.get("notes", [])]


def attention_table(layers: list[dict[str, Any]]) -> Table:
    """Dimensions a head of every narrowed attention, and its MACs an image."""
    table = FittingTable("narrowed attention")
    for column in ("layer", "heads", "of", "query, key", "values", "MMACs", "of "):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in layers:
        table.add_row(
            layer["name"], str(layer["heads"]), str(layer["head_dim"]), str(layer["qk"]), str(layer["v"]),
            f"{layer['macs'] / 1e6:.1f}", f"{layer['dense_macs'] / 1e6:.1f}",
        )  # fmt: skip
    return table


def layer_table(layers: list[dict[str, Any]]) -> Table:
    """Experts, union and mean width of every layer."""
    table = FittingTable("layers")
    for column in ("layer", "status", "experts", "union", "mean width", "of", "noise"):
        table.add_column(column, justify="left" if column in ("layer", "status") else "right")
    for layer in layers:
        table.add_row(
            layer["name"], status_of(layer), str(layer["experts"]), str(layer["union"]), f"{layer['mean_width']:.0f}",
            str(layer["hidden"]), f"{layer['noise']:.0%}",
        )  # fmt: skip
    return table
