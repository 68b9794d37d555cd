"""Which rows of a table are level with its best: their means differ by no more than both standard deviations and both
standard errors of the test sets together. Of a single seed that is not known, so there equal prints alone are level.
"""

import itertools

from recombine.report.table_data import Entry, Table


def margin(entry: Entry) -> float | None:
    """The standard deviation over the seeds and the test set's standard error, if known; None: of one seed."""
    return None if entry.spread is None else entry.spread + (entry.error or 0.0)


def level(one: Entry, other: Entry) -> bool:
    """Whether two entries with numbers cannot be told apart."""
    margins = margin(one), margin(other)
    return one.text == other.text or None not in margins and abs(one.mean - other.mean) <= sum(margins)


def ties(table: Table, j: int) -> set[int]:
    """The rows that are level with the best of their block in column j, the best among them; none if it is alone."""
    found: set[int] = set()
    for _, block in itertools.groupby(range(len(table.rows)), key=lambda i: table.rows[i].labels[:-1]):
        entries = {i: e for i in block if (e := table.rows[i].entries[j]).mean is not None}
        top = [e for e in entries.values() if e.best]
        same = {i for i, e in entries.items() if any(level(e, best) for best in top)}
        found |= same if len(same) > 1 else set()
    return found


def main(table: Table) -> int | None:
    """The column that says most in short: the last mean over columns, or else the first that has a best."""
    ranked = [j for j, column in enumerate(table.columns) if column.measure and column.measure.best]
    means = [j for j in ranked if table.columns[j].kind == "mean"]
    return means[-1] if means else ranked[0] if ranked else None
