"""Which rows of a table are level with its best: their means differ by no more than both standard deviations over the
seeds and both standard errors of the test sets together, as far as they are known. Of a single seed a larger difference
says nothing.
"""

import itertools

from recombine.report.table_data import Entry, Table


def margin(entry: Entry) -> float:
    """What is known of an entry's error: standard deviation over the seeds plus the test set's standard error."""
    return (entry.spread or 0.0) + (entry.error or 0.0)


def level(one: Entry, other: Entry) -> bool:
    """Whether two entries with numbers cannot be told apart."""
    return one.text == other.text or abs(one.mean - other.mean) <= margin(one) + margin(other)


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
