"""A table as plain data: columns, rows of entries, and the lines below. Every format is rendered from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recombine.errors import UsageError
from recombine.report import words
from recombine.report.paper import Number
from recombine.report.records import Record

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """What is measured and how it is printed. best: max, min, or None where no number is better than another."""

    label: str
    key: str
    scale: float = 1.0
    digits: int = 1
    best: str | None = None

    def of(self, record: Record) -> float | None:
        """The number of a run; None where its result has none, or one that is not finite."""
        value = record.get(self.key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        number = float(value) if abs(value) < 1e300 else math.inf  # an integer may be larger than any float
        return number * self.scale if math.isfinite(number) else None

    def error(self, record: Record) -> float | None:
        """The standard error of a run's number that the size of its test set gives; None where it is not known.

        It is binomial for a share of samples (`acc`), else what the harness wrote beside its score.
        """
        if (value := self.of(record)) is None:
            return None
        path = self.key.replace("{metric}", record.get("metric") or "")
        split, _, name = path.partition(".")
        if name == "acc":
            share, count = value / self.scale, record.get(f"data.sizes.{split}")
            return abs(self.scale) * math.sqrt(share * (1 - share) / count) if count else None
        beside = record.get(f"{path}_stderr")
        return abs(self.scale) * beside if isinstance(beside, int | float) else None


@dataclass(frozen=True)
class Entry:
    """One cell of the table. mean: None where no run, or not every run that a mean needs, has a result."""

    mean: float | None = None
    spread: float | None = None  # sample standard deviation; None for n = 1
    n: int = 0  # replicates that exist
    wanted: int = 0  # replicates that the grid has
    error: float | None = None  # standard error by the test set's size; None where it is not known
    paper: Number | None = None
    best: bool = False
    truncate: bool = False
    digits: int = 1

    @property
    def text(self) -> str:
        """The mean as it is printed."""
        return "" if self.mean is None else shown(self.mean, self.digits, self.truncate)

    @property
    def difference(self) -> float | None:
        """Our mean, as printed, minus the paper's number."""
        if self.paper is None or self.mean is None:
            return None
        return round(float(self.text) - self.paper.value, max(self.digits, 1))


@dataclass(frozen=True)
class Column:
    """label: the column's, the mean's or the extra's; measure: None where every row has its own."""

    kind: str  # cell, mean or extra
    label: str | None  # None: the table has no axis of columns
    measure: Measure | None
    several: bool = False  # there are other columns of the same label
    axis: str | None = None  # of the columns

    @property
    def title(self) -> str:
        """The column's head, in words."""
        name = words.label(self.axis, self.label) if self.kind == "cell" and self.label else self.label
        measured = self.measure.label if self.measure and (self.several or self.label is None) else None
        return " ".join(part for part in (name, measured) if part)


@dataclass(frozen=True)
class Row:
    """labels: one an axis of rows, as the grid has them; names: the same in words; entries: one a column."""

    labels: Labels
    names: Labels
    entries: list[Entry]

    @property
    def name(self) -> str:
        return " / ".join(self.names)


@dataclass
class Table:
    """Everything that is printed."""

    name: str
    title: str
    axes: Labels  # of the rows
    columns: list[Column]
    rows: list[Row]
    replicates: Labels
    done: int  # runs that have a result
    total: int  # runs of the grid
    compares: bool  # a difference to the paper means something
    notes: list[str] = field(default_factory=list)

    @property
    def heads(self) -> list[str]:
        """The heads of the row labels, in words."""
        return [words.heading(axis) for axis in self.axes]

    @property
    def scores(self) -> list[Entry]:
        """The entries of cells and means, which are over replicates."""
        kinds = [column.kind for column in self.columns]
        return [e for row in self.rows for kind, e in zip(kinds, row.entries, strict=True) if kind != "extra"]

    @property
    def even(self) -> bool:
        """Every entry that exists has all its replicates: n need not be shown."""
        return all(entry.n in (0, entry.wanted) for entry in self.scores)


def measure(label: str, given: Mapping[str, Any]) -> Measure:
    """A line of `report.values` or `report.extra`."""
    try:
        m = Measure(label, **given)
        right = isinstance(m.key, str) and isinstance(m.scale, int | float) and isinstance(m.digits, int)
    except TypeError:
        right = False
    if not right:
        raise UsageError(f"report: {label}={given}: takes a key, and scale, digits and best if wanted")
    if m.best not in ("max", "min", None):
        raise UsageError(f"report: {label}: best={m.best}: must be max, min or null")
    return m


def measures(report: Mapping[str, Any], *keys: str) -> list[Measure]:
    """The measures below these keys (`values`, `extra`) of an experiment's report."""
    return [measure(label, given) for key in keys for label, given in (report.get(key) or {}).items()]


def shown(value: float, digits: int, cut: bool = False) -> str:
    """A number with so many digits behind the point; cut: toward zero instead of rounded (81.96 -> 81.9).

    Half a digit is rounded up. What lies less than a ten-thousandth of a digit below counts as half or whole, so that a
    result and its record, which has seven digits, print the same.
    """
    scaled = abs(value) * 10**digits + 1e-4
    whole = math.floor(scaled if cut else scaled + 0.5)
    return f"{math.copysign(whole / 10**digits, value):.{digits}f}"
