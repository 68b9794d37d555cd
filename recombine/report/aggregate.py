"""Numbers over many runs: means and standard deviations over the seeds, the best of a column, the paper's beside ours.

Axes that are neither rows nor columns of a table are averaged. Those beside `seed` are averaged within a seed, which
counts only with all its runs; then the mean is over the seeds, with their sample standard deviation (n - 1). Without a
seed all the averaged axes are such replicates. A mean over columns is a mean over the replicates that every column has;
so is its deviation. An extra is averaged over the columns, once all of them have it.
"""

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from recombine.errors import UsageError
from recombine.report.records import Record, Runs
from recombine.report.table_data import Entry, Labels, Measure

Place = tuple[Labels, str | None]  # row and column


class Groups:
    """The records of an experiment by row, column and replicate.

    Args:
        down: the axes of the rows.
        across: the axis of the columns, if there is one.
        replicates: the axes whose labels tell replicates apart.
    """

    def __init__(self, runs: Runs, down: Sequence[str], across: str | None, replicates: Labels):
        def place(labels: Mapping[str, str]) -> tuple[Place, Labels]:
            row = tuple(labels[axis] for axis in down)
            return (row, labels[across] if across else None), tuple(labels[axis] for axis in replicates)

        self.across = across
        self.cells: dict[Place, Counter[Labels]] = defaultdict(Counter)  # how many runs make up each replicate
        self.records: dict[Place, dict[Labels, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for cell in runs.cells:
            where, replicate = place(cell)
            self.cells[where][replicate] += 1
        for record in runs.records:
            where, replicate = place(record.labels)
            self.records[where][replicate].append(record)
        present = {row for row, _ in self.cells}
        self.rows = [row for row in itertools.product(*(labels(runs.cells, axis) for axis in down)) if row in present]

    def wanted(self, row: Labels, column: str | None) -> int:
        """How many replicates the grid has there."""
        return len(self.cells.get((row, column), ()))

    def values(self, row: Labels, column: str | None, m: Measure) -> dict[Labels, float]:
        """Replicate -> number, of the replicates that have all their runs."""
        numbers = {}
        for replicate, records in self.records.get((row, column), {}).items():
            values = [value for record in records if (value := m.of(record)) is not None]
            if len(values) == self.cells[row, column][replicate]:
                numbers[replicate] = statistics.fmean(values)
        return numbers

    def error(self, row: Labels, column: str | None, m: Measure) -> float | None:
        """The standard error by the test set's size. A cell's runs score the same samples, so it stays."""
        each = [m.error(record) for records in self.records.get((row, column), {}).values() for record in records]
        return statistics.fmean(each) if each and None not in each else None

    def cell(self, row: Labels, column: str | None, m: Measure) -> Entry:
        numbers = list(self.values(row, column, m).values())
        return replace(entry(numbers, self.wanted(row, column), m.digits), error=self.error(row, column, m))

    def extra(self, row: Labels, columns: Sequence[str | None], m: Measure) -> Entry:
        """The mean over the columns that the row has, once every one of them has a number."""
        each = [self.values(row, column, m) for column in columns if self.wanted(row, column)]
        means = [statistics.fmean(values.values()) for values in each if values]
        return replace(entry(means if len(means) == len(each) else [], len(each), m.digits), spread=None)

    def mean(self, row: Labels, name: str, means: Mapping, columns: Sequence, m: Measure) -> Entry:
        """A mean over columns, or over other means."""

        def over(values: Callable[[str], float], name: str) -> float:
            return statistics.fmean(
                over(values, member) if member in means else values(member) for member in members(name, means, columns)
            )

        below = leaves(name, means, columns)
        wanted = min(self.wanted(row, column) for column in below)
        numbers = {column: self.values(row, column, m) for column in below}
        replicates = set.intersection(*(set(values) for values in numbers.values()))
        each = [over(lambda column, r=replicate: numbers[column][r], name) for replicate in sorted(replicates)]
        errors = {column: self.error(row, column, m) for column in below}
        error = None
        if None not in errors.values():
            shares = [over(lambda c, one=column: errors[c] * (c == one), name) for column in errors]
            error = math.hypot(*shares) if self.across == "data.task" else sum(shares)  # other tasks, other samples
        return replace(entry(each, wanted, m.digits), error=error)


def entry(numbers: Sequence[float], wanted: int, digits: int) -> Entry:
    """The mean of the replicates' numbers. wanted: how many replicates the grid has."""
    if not numbers:
        return Entry(wanted=wanted, digits=digits)
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Entry(statistics.fmean(numbers), spread, len(numbers), wanted, digits=digits)


def members(name: str, means: Mapping, columns: Sequence) -> Sequence[str]:
    """What a mean is over: columns or other means. A mean that is null is over all columns.

    Raises:
        UsageError: it is over nothing, or over something that does not exist.
    """
    named = columns if means[name] is None else means[name]
    if not named:
        raise UsageError(f"report.means.{name}: empty; name columns or other means, or say null for all columns")
    for member in named:
        if member not in columns and member not in means:
            raise UsageError(
                f"report.means.{name}: {member} is neither a column nor a mean; columns are {', '.join(columns)}"
            )
    return named


def leaves(name: str, means: Mapping, columns: Sequence, above: tuple[str, ...] = ()) -> list[str]:
    """The columns that a mean rests on, directly or through other means."""
    if name in above:
        raise UsageError(f"report.means.{name}: rests on itself; name columns or other means")
    named, above = members(name, means, columns), (*above, name)
    return [
        leaf for member in named for leaf in (leaves(member, means, columns, above) if member in means else [member])
    ]


def labels(cells: Sequence[Mapping[str, str]], axis: str) -> list[str]:
    """The labels of an axis, in the grid's order."""
    return list(dict.fromkeys(cell[axis] for cell in cells))


def best(entries: Mapping[int, Entry], better: str) -> set[int]:
    """The keys of the best entries, as printed: equal ones share it. better: max or min."""
    numbers = {key: float(e.text) for key, e in entries.items()}
    top = (max if better == "max" else min)(numbers.values())
    return {key for key, number in numbers.items() if number == top}
