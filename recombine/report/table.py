"""An experiment's table: our means over the seeds, the paper's numbers, what is missing, and what is best.

Its shape comes from the `report` key of the experiment:

    title: "CERSA Tab. 9: ..."
    rows: method             # an axis of the grid, or a list of axes: the last one varies fastest, and the best is
                             # marked within each block of the others; null: one row for each of `values`
    columns: data.task       # an axis; null: one column for each of `values`
    values: {top-1: {key: test.acc, scale: 100, digits: 1, best: max}}   # label -> where in the result, how to print
    extra: {memory (MiB): {key: account.memory_mib, best: min}}          # one number a row
    means: {Natural: [cifar100, dtd], Structured: [...], mean: null, of the groups: [Natural, Structured]}
    truncate: true           # means are cut to their digits, not rounded (CRISP)
    paper: {...}             # see paper.py
    notes: [...]             # lines below the table
    plots: {...}             # see plots.py

How the numbers are averaged: see aggregate.py. The lines below the table: see notes.py.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recombine.errors import UsageError
from recombine.report import words
from recombine.report.aggregate import Groups, best, labels
from recombine.report.notes import notes
from recombine.report.paper import Number, Paper
from recombine.report.records import Runs
from recombine.report.table_data import Column, Labels, Measure, Row, Table, measures

KEYS = ("title", "rows", "columns", "values", "extra", "means", "truncate", "paper", "notes", "plots")


@dataclass(frozen=True)
class Layout:
    """What an experiment's report asks for, checked against the grid."""

    down: list[str]  # axes of the rows
    across: str | None  # axis of the columns
    columns: list[str | None]  # labels of `across`
    values: list[Measure]
    extras: list[Measure]
    means: Mapping[str, Any]
    truncate: bool

    @classmethod
    def read(cls, report: Mapping[str, Any], cells: Sequence[Mapping[str, str]]) -> "Layout":
        """The layout that an experiment's `report` asks for, on the labels of its cells.

        Raises:
            UsageError: the report names a key or an axis that does not exist, or measures nothing.
        """
        if unknown := set(report) - set(KEYS):
            raise UsageError(f"report.{unknown.pop()}: there is no such key; it takes {', '.join(KEYS)}")
        axes, across, down = list(cells[0]), report.get("columns"), report.get("rows") or []
        down = [down] if isinstance(down, str) else list(down)
        for axis in [*down, *([across] if across else [])]:
            if axis not in axes:
                raise UsageError(f"report: {axis} is no axis of the grid; choose from {', '.join(axes)}")
        if not (values := measures(report, "values")):
            raise UsageError(
                "report.values: empty; name what is measured, for example {top-1: {key: test.acc, scale: 100}}"
            )
        columns = labels(cells, across) if across else [None]
        extras, means = measures(report, "extra"), report.get("means") or {}
        return cls(down, across, columns, values, extras, means, bool(report.get("truncate")))

    def heads(self) -> list[Column]:
        """The columns of the table: the grid's, the means over them, the extras."""
        measured, several = self.values if self.down else [None], len(self.values) > 1
        cells = [Column("cell", label, m, several, self.across) for label in self.columns for m in measured]
        means = [Column("mean", label, m, several) for label in self.means for m in measured]
        return [*cells, *means, *(Column("extra", None, m) for m in self.extras)]

    def row(self, row: Labels, groups: Groups, source: Paper | None) -> Row:
        """row: one label an axis of rows, or the label of a value."""
        own = None if self.down else next(m for m in self.values if m.label == row[0])
        place = row if self.down else ()
        entries = []
        for column in self.heads():
            m = column.measure or own
            if column.kind == "cell":
                entry = groups.cell(place, column.label, m)
            elif column.kind == "mean":
                entry = replace(groups.mean(place, column.label, self.means, self.columns, m), truncate=self.truncate)
            else:
                entry = groups.extra(place, self.columns, m)
            if source:
                alone = not self.down or len(self.values) == 1
                entry = replace(entry, paper=look_up(source, " / ".join(row), column, m, alone))
            entries.append(entry)
        names = tuple(map(words.label, self.down, row)) if self.down else row
        return Row(row, names, entries)


def build(name: str, report: Mapping[str, Any], runs: Runs) -> Table:
    """The table of an experiment, from its YAML's `report`.

    Raises:
        UsageError: the report names an axis, a column or a key that does not exist.
    """
    layout = Layout.read(report, runs.cells)
    source = Paper(report["paper"]) if report.get("paper") else None
    averaged = tuple(axis for axis in runs.cells[0] if axis not in (*layout.down, layout.across))
    replicates = ("seed",) if "seed" in averaged else averaged
    groups, columns = Groups(runs, layout.down, layout.across, replicates), layout.heads()
    places = groups.rows if layout.down else [(m.label,) for m in layout.values]
    rows = [layout.row(place, groups, source) for place in places]
    table = Table(
        name=name,
        title=report.get("title") or name,
        axes=tuple(layout.down) or ("value",),
        columns=columns,
        rows=mark_best(rows, columns) if layout.down else rows,
        replicates=replicates,
        done=len(runs.records),
        total=len(runs.cells),
        compares=source is None or source.compares,
    )
    table.notes = notes(table, report, runs, source)
    return table


def look_up(paper: Paper, row: str, column: Column, m: Measure, alone: bool) -> Number | None:
    """The paper's number of an entry. alone: no other value stands in the row, so the file need not name it."""
    if column.kind == "extra":
        return paper.extra(row, m.label)
    if not alone and m.label not in paper.spec.get("values", {}):
        return None
    find = paper.cell if column.kind == "cell" else paper.mean
    return find(row, column.label, m.label)


def mark_best(rows: list[Row], columns: list[Column]) -> list[Row]:
    """Marks the best of every column within its block of rows; a single entry is not marked."""
    marked = [list(row.entries) for row in rows]
    for j, column in enumerate(columns):
        for _, block in itertools.groupby(range(len(rows)), key=lambda i: rows[i].labels[:-1]):
            entries = {i: marked[i][j] for i in block if marked[i][j].mean is not None}
            if column.measure.best is None or len(entries) < 2:
                continue
            for i in best(entries, column.measure.best):
                marked[i][j] = replace(marked[i][j], best=True)
    return [replace(row, entries=entries) for row, entries in zip(rows, marked, strict=True)]
