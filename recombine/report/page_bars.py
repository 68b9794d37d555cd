"""Bars of a few numbers: as rows of HTML, which stay readable on a phone, and as a thumbnail."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from recombine.report import words
from recombine.report.page_markup import Markup, tag


class Bar(NamedTuple):
    """A number with its name, and an interval where there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def from_csv(path: Path) -> list[Bar]:
    """The bars of a CSV with the columns `method` and `accuracy`, and perhaps `low` and `high`."""

    def number(line: dict, key: str) -> float | None:
        return float(line[key]) if line.get(key) else None

    with path.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["accuracy"]]
    return [
        Bar(words.method(line["method"]), float(line["accuracy"]), number(line, "low"), number(line, "high"))
        for line in lines
    ]


def rows(bars: Sequence[Bar], label: str) -> Markup:
    """A row a bar: its name, the bar with its interval, the number. They start from 0."""
    most = max(bar.high if bar.high is not None else bar.value for bar in bars)
    items = []
    for bar in bars:
        length = tag("i", style=f"width:{100 * bar.value / most:.1f}%")
        whisker, words_of = "", f"{bar.value:g}"
        if bar.low is not None and bar.high is not None:
            place = f"left:{100 * bar.low / most:.1f}%;width:{100 * (bar.high - bar.low) / most:.1f}%"
            whisker, words_of = tag("s", style=place), f"{bar.value:g} ({bar.low:g} to {bar.high:g})"
        items.append(tag("li", tag("span", bar.name), tag("span", length, whisker, class_="track"), tag("b", words_of)))
    return tag("ul", *items, class_="bars", aria_label=label)


def thumb(values: Sequence[float], best: set[int]) -> Markup:
    """The same without words. best: places of the bars that are marked."""
    top, step = max(map(abs, values)) or 1.0, 100 / len(values)
    drawn = [
        tag(
            "rect",
            y=f"{i * step + 0.1 * step:.1f}",
            width=f"{150 * abs(value) / top:.1f}",
            height=f"{0.8 * step:.1f}",
            class_="first" if i in best else None,
        )
        for i, value in enumerate(values)
    ]
    return tag("svg", *drawn, viewBox="0 0 150 100", class_="thumb", aria_hidden="true")
