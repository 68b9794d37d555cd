"""An experiment's table: our means over the seeds, the paper's numbers, what is missing, and what is best.

`Table` is plain data that every format is rendered from. Its shape comes from the `report` key of the experiment:

    title: "CERSA Tab. 9: ..."
    rows: method             # an axis of the grid, or a list of axes (the last varies fastest, best is per block of the
                             # others); null: one row a value
    columns: data.task       # an axis; null: one column a value
    values: {top-1: {key: test.acc, scale: 100, digits: 1, best: max}}   # label -> where in the result, how to print
    extra: {memory (MiB): {key: account.memory_mib, best: min}}          # one number a row
    means: {Natural: [cifar100, dtd], Structured: [...], mean: null, of the groups: [Natural, Structured]}
    truncate: true           # means are cut to their digits, not rounded (CRISP)
    paper: {...}             # see paper.py
    notes: [...]             # lines below the table
    plots: {...}             # see plots.py

Other axes are averaged: those beside `seed` within a seed, which counts only with all its runs; then the seeds, with
their sample standard deviation (n - 1). Without a seed all of them are such replicates. A mean over columns is one of
the replicates that every column has; so is its deviation. An extra is averaged over the columns, where all exist.
"""

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from recombine.errors import UsageError
from recombine.report import records
from recombine.report.paper import Number, Paper
from recombine.report.records import Record, Runs

KEYS = ("title", "rows", "columns", "values", "extra", "means", "truncate", "paper", "notes", "plots")
Labels = tuple[str, ...]
Place = tuple[Labels, str | None]  # row and column


@dataclass(frozen=True)
class Measure:
    """What is measured and how it is printed. best: max, min, or None where no number is better than another."""

    label: str
    key: str
    scale: float = 1.0
    digits: int = 1
    best: str | None = None

    def of(self, record: Record) -> float | None:
        value = record.get(self.key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return value * self.scale if number else None


@dataclass(frozen=True)
class Column:
    """label: the column's, the mean's or the extra's; measure: None where every row has its own."""

    kind: str  # cell, mean or extra
    label: str | None  # None: the table has no axis of columns
    measure: Measure | None
    several: bool = False  # there are other columns of the same label

    @property
    def title(self) -> str:
        shown = [self.label, self.measure.label if self.measure and (self.several or self.label is None) else None]
        return " ".join(part for part in shown if part)


@dataclass(frozen=True)
class Entry:
    """One cell of the table. mean: None where no run, or not every run that a mean needs, has a result."""

    mean: float | None = None
    spread: float | None = None  # sample standard deviation; None for n = 1
    n: int = 0  # replicates that exist
    wanted: int = 0  # replicates that the grid has
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
        """Ours, as printed, less the paper's."""
        if self.paper is None or self.mean is None:
            return None
        return round(float(self.text) - self.paper.value, max(self.digits, 1))


@dataclass(frozen=True)
class Row:
    labels: Labels  # one an axis of rows
    entries: list[Entry]  # one a column

    @property
    def label(self) -> str:
        return " / ".join(self.labels)


@dataclass
class Table:
    """Everything that is printed. notes: what the run, the paper and the experiment have to say about the numbers."""

    name: str
    title: str
    axes: Labels  # names of the row labels
    columns: list[Column]
    rows: list[Row]
    replicates: Labels
    done: int
    total: int
    compares: bool  # a difference to the paper means something
    notes: list[str] = field(default_factory=list)

    @property
    def scores(self) -> list[Entry]:
        """The entries of cells and means, which are over replicates."""
        kinds = [column.kind for column in self.columns]
        return [e for row in self.rows for kind, e in zip(kinds, row.entries, strict=True) if kind != "extra"]

    @property
    def even(self) -> bool:
        """Every entry that exists has all its replicates: n need not be shown."""
        return all(entry.n in (0, entry.wanted) for entry in self.scores)


def build(name: str, spec: Mapping[str, Any], runs: Runs) -> Table:
    """The table of an experiment.

    Raises:
        UsageError: the report names an axis, a column or a key that does not exist.
    """
    if unknown := set(spec) - set(KEYS):
        raise UsageError(f"report.{unknown.pop()}: there is no such key; it takes {', '.join(KEYS)}")
    axes = list(runs.cells[0])
    across = spec.get("columns")
    down = spec.get("rows") or []
    down = [down] if isinstance(down, str) else list(down)
    for axis in [*down, *([across] if across else [])]:
        if axis not in axes:
            raise UsageError(f"report: {axis} is no axis of the grid; choose from {', '.join(axes)}")
    measures = [measure(label, given) for label, given in (spec.get("values") or {}).items()]
    extras = [measure(label, given) for label, given in (spec.get("extra") or {}).items()]
    if not measures:
        raise UsageError(
            "report.values: empty; name what is measured, for example {top-1: {key: test.acc, scale: 100}}"
        )
    names = labels(runs.cells, across) if across else [None]
    means = spec.get("means") or {}
    columns = [Column("cell", label, m, len(measures) > 1) for label in names for m in (measures if down else [None])]
    columns += [Column("mean", label, m, len(measures) > 1) for label in means for m in (measures if down else [None])]
    columns += [Column("extra", None, m) for m in extras]

    source = Paper(spec["paper"]) if spec.get("paper") else None
    others = tuple(axis for axis in axes if axis not in (*down, across))
    replicates = ("seed",) if "seed" in others else others
    groups = Groups(runs, down, across, replicates)
    cut = bool(spec.get("truncate"))
    rows = []
    for row in groups.rows if down else [(m.label,) for m in measures]:
        own = None if down else next(m for m in measures if m.label == row[0])
        here = row if down else ()
        entries = []
        for column in columns:
            m = column.measure or own
            if column.kind == "cell":
                entry = groups.cell(here, column.label, m)
            elif column.kind == "mean":
                entry = groups.mean(here, column.label, means, names, m, cut)
            else:
                entry = groups.extra(here, names, m)
            printed = look_up(source, " / ".join(row), column, m, not down or len(measures) == 1) if source else None
            entries.append(replace(entry, paper=printed))
        rows.append(Row(row, entries))
    rows = mark_best(rows, columns, down, measures)
    table = Table(
        name=name,
        title=spec.get("title") or name,
        axes=tuple(down) or ("value",),
        columns=columns,
        rows=rows,
        replicates=replicates,
        done=len(runs.records),
        total=len(runs.cells),
        compares=source is None or source.compares,
    )
    table.notes = notes(table, spec, runs, source)
    return table


class Groups:
    """The records by row, column and replicate."""

    def __init__(self, runs: Runs, down: Sequence[str], across: str | None, replicates: Labels):
        def place(found: Mapping[str, str]) -> tuple[Place, Labels]:
            row = tuple(found[axis] for axis in down)
            return (row, found[across] if across else None), tuple(found[axis] for axis in replicates)

        self.cells: dict[Place, Counter[Labels]] = defaultdict(Counter)  # how many runs make up each replicate
        self.records: dict[Place, dict[Labels, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for cell in runs.cells:
            where, copy = place(cell)
            self.cells[where][copy] += 1
        for record in runs.records:
            where, copy = place(record.labels)
            self.records[where][copy].append(record)
        present = {row for row, _ in self.cells}
        self.rows = [row for row in itertools.product(*(labels(runs.cells, axis) for axis in down)) if row in present]

    def wanted(self, row: Labels, column: str | None) -> int:
        return len(self.cells.get((row, column), ()))

    def values(self, row: Labels, column: str | None, m: Measure) -> dict[Labels, float]:
        """Replicate -> number, of those that have all their runs."""
        found = {}
        for copy, same in self.records.get((row, column), {}).items():
            values = [value for record in same if (value := m.of(record)) is not None]
            if len(values) == self.cells[row, column][copy]:
                found[copy] = statistics.fmean(values)
        return found

    def cell(self, row: Labels, column: str | None, m: Measure) -> Entry:
        return entry(list(self.values(row, column, m).values()), self.wanted(row, column), m.digits)

    def extra(self, row: Labels, columns: Sequence[str | None], m: Measure) -> Entry:
        """The mean over the columns that the row has, once every one of them has something."""
        held = [self.values(row, column, m) for column in columns if self.wanted(row, column)]
        found = [statistics.fmean(values.values()) for values in held if values]
        return replace(entry(found if len(found) == len(held) else [], len(held), m.digits), spread=None)

    def mean(self, row: Labels, name: str, means: Mapping, names: Sequence, m: Measure, cut: bool) -> Entry:
        """A mean over columns, or over other means."""

        def over(values: Callable[[str], float], name: str) -> float:
            return statistics.fmean(
                over(values, one) if one in means else values(one) for one in members(name, means, names)
            )

        columns = leaves(name, means, names)
        wanted = min(self.wanted(row, column) for column in columns)
        held = {column: self.values(row, column, m) for column in columns}
        copies = set.intersection(*(set(found) for found in held.values()))
        each = [over(lambda column, c=copy: held[column][c], name) for copy in sorted(copies)]
        return replace(entry(each, wanted, m.digits), truncate=cut)


def entry(found: Sequence[float], wanted: int, digits: int) -> Entry:
    if not found:
        return Entry(wanted=wanted, digits=digits)
    spread = statistics.stdev(found) if len(found) > 1 else None
    return Entry(statistics.fmean(found), spread, len(found), wanted, digits=digits)


def members(name: str, means: Mapping, names: Sequence) -> Sequence[str]:
    """What a mean is over: columns or other means; null: all columns."""
    found = names if means[name] is None else means[name]
    if not found:
        raise UsageError(f"report.means.{name}: empty; name columns or other means, or say null for all columns")
    for one in found:
        if one not in names and one not in means:
            raise UsageError(
                f"report.means.{name}: {one} is neither a column nor a mean; columns are {', '.join(names)}"
            )
    return found


def leaves(name: str, means: Mapping, names: Sequence, above: tuple[str, ...] = ()) -> list[str]:
    """The columns that a mean rests on."""
    if name in above:
        raise UsageError(f"report.means.{name}: rests on itself; name columns or other means")
    found, above = members(name, means, names), (*above, name)
    return [leaf for one in found for leaf in (leaves(one, means, names, above) if one in means else [one])]


def measure(label: str, given: Mapping[str, Any]) -> Measure:
    try:
        made = Measure(label, **given)
        right = isinstance(made.key, str) and isinstance(made.scale, int | float) and isinstance(made.digits, int)
    except TypeError:
        right = False
    if not right:
        raise UsageError(f"report: {label}={given}: takes a key, and scale, digits and best if wanted")
    if made.best not in ("max", "min", None):
        raise UsageError(f"report: {label}: best={made.best}: must be max, min or null")
    return made


def labels(cells: Sequence[Mapping[str, str]], axis: str) -> list[str]:
    """The labels of an axis, in the grid's order."""
    return list(dict.fromkeys(cell[axis] for cell in cells))


def look_up(paper: Paper, row: str, column: Column, m: Measure, alone: bool) -> Number | None:
    """alone: no other value stands in the row, so the file need not name it."""
    if column.kind == "extra":
        return paper.extra(row, m.label)
    if not alone and m.label not in paper.spec.get("values", {}):
        return None
    look = paper.cell if column.kind == "cell" else paper.mean
    return look(row, column.label, m.label)


def mark_best(rows: list[Row], columns: list[Column], down: Sequence[str], measures: list[Measure]) -> list[Row]:
    """Marks the best of every column within its block of rows, as printed: equal ones share it, one alone has none."""
    if not down:
        return rows
    marked = [list(row.entries) for row in rows]
    for j, column in enumerate(columns):
        for _, block in itertools.groupby(range(len(rows)), key=lambda i: rows[i].labels[:-1]):
            found = [i for i in block if marked[i][j].mean is not None]
            if column.measure.best is None or len(found) < 2:
                continue
            numbers = {i: float(marked[i][j].text) for i in found}
            best = (max if column.measure.best == "max" else min)(numbers.values())
            for i in found:
                marked[i][j] = replace(marked[i][j], best=numbers[i] == best)
    return [replace(row, entries=entries) for row, entries in zip(rows, marked, strict=True)]


def notes(table: Table, spec: Mapping[str, Any], runs: Runs, paper: Paper | None) -> list[str]:
    """The lines below the table."""
    found = [f"{table.done} of {table.total} runs."]
    committed = sum("cell" in record.result for record in runs.records)
    if 0 < committed < table.done:
        found[0] += f" {committed} of them as committed earlier."
    if runs.other:
        what = next(iter(runs.other.values()))
        found[0] += f" Left out: {len(runs.other)} of another configuration ({what})."
    if runs.failed:
        reasons = dict.fromkeys(runs.failed.values())
        found[0] += f" {len(runs.failed)} failed: {'; '.join(list(reasons)[:3])}{'; ...' if len(reasons) > 3 else ''}."
    most = max((e.n for e in table.scores), default=0)
    if most > 1 or not table.even:
        over = " and ".join(table.replicates)
        n = f"n = {most}" if table.even else "n in brackets where runs are missing"
        found.append(f"Mean ± sample standard deviation over {over} ({n}).")
    for m in [measure(label, given) for key in ("values", "extra") for label, given in (spec.get(key) or {}).items()]:
        if lack := sum(m.of(record) is None for record in runs.records):
            found.append(f"{m.label} ({m.key}): no number in {lack} of {table.done} runs.")
    if paper:
        how = (
            "difference = ours − the paper's" if paper.compares else "another scale: compare the order, not the numbers"
        )
        found.append(f"Paper: {paper.spec['file']}; {how}.")
        if agreement := order(table):
            found.append(f"Pairs of rows in the paper's order: {agreement}.")
        found += doubts(table)
    if warning := records.provenance(runs.records):
        found.append(warning)
    return found + [str(line) for line in spec.get("notes") or []]


def order(table: Table) -> str:
    """For every column, of the pairs of rows of a block that the paper tells apart, how many come in its order here;
    and which come in the other by more than both deviations together."""
    found = []
    for j, column in enumerate(table.columns):
        both = [(row, e) for row in table.rows if (e := row.entries[j]).paper and e.mean is not None]
        same, pairs, against = 0, 0, []
        for first, second in itertools.combinations(both, 2):
            (above, high), (below, low) = sorted((first, second), key=lambda one: -one[1].paper.value)
            if high.paper.value == low.paper.value or above.labels[:-1] != below.labels[:-1]:
                continue
            pairs, same = pairs + 1, same + (float(high.text) > float(low.text))
            if None not in (high.spread, low.spread) and low.mean - high.mean > high.spread + low.spread:
                against.append(f"{below.label} over {above.label}")
        if pairs:
            shown = f"{', '.join(against[:3])}{', ...' if len(against) > 3 else ''}"
            found.append(f"{column.title} {same} of {pairs}" + (f" (clearly not: {shown})" if against else ""))
    return "; ".join(found)


def doubts(table: Table, most: int = 6) -> list[str]:
    """Why some of the paper's numbers that stand in the table are doubtful."""
    found: dict[str, list[str]] = {}
    for row in table.rows:
        for column, e in zip(table.columns, row.entries, strict=True):
            if e.paper and e.paper.doubt:
                where = found.setdefault(e.paper.doubt, [])
                where += [part for part in [f"{row.label}, {column.title}"] if part not in where]
    shown = [f"The paper's {where[0]}{' and others' if len(where) > 1 else ''}: {why}." for why, where in found.items()]
    return shown[:most] + ([f"{len(shown) - most} more doubts are in the file."] if len(shown) > most else [])


def shown(value: float, digits: int, cut: bool = False) -> str:
    """A number with so many digits behind the point; cut: toward zero instead of rounded (81.96 -> 81.9)."""
    if cut:
        value = math.trunc(round(value * 10**digits, 6)) / 10**digits
    return f"{value:.{digits}f}"
