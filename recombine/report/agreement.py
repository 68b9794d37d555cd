"""How far a table's rows come in the paper's order, beside what chance gives, and which pairs clearly do not.

A pair of rows that the paper tells apart counts 1 where ours come in its order and 1/2 where ours are equal. Rows of
different blocks make no pair. By chance, every order of our numbers within a block is as likely (Kendall 1948).

A pair is clearly against the paper's order if both rows have three seeds or more, and if their means differ by more
than both standard deviations and both standard errors of the test sets together. Of the pairs of equal methods with
three seeds at most 4 % do so in one direction, whatever share of the error is the test set's (simulated); with two
seeds and the deviations alone it would be 11 % and more.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import sqrt
from typing import NamedTuple

from recombine.report.table_data import Column, Entry, Row, Table

SEEDS = 3  # from which on a difference is called clear
Pair = tuple[float, float]  # our number as printed, the paper's


class Agreement(NamedTuple):
    """Of a column: pairs in the paper's order, pairs that the paper tells apart, and what chance gives."""

    same: float
    pairs: int
    mean: float
    deviation: float


def agreement(table: Table) -> list[str]:
    """A line with the pairs of every column, and one with what keeps pairs from being called clear."""
    counts, doubts = [], defaultdict(list)
    for j, column in enumerate(table.columns):
        blocks = with_paper(table, j)
        same, pairs, mean, deviation = of_column(table, j)
        if not pairs:
            continue
        line = f"{column.title} {same:g} of {pairs}, by chance {mean:g} ± {deviation:.1f}"
        if against := [names for block in blocks for names in clear(block)]:
            line += f" (clearly not: {', '.join(against[:3])}{', ...' if len(against) > 3 else ''})"
        counts.append(line)
        if why := unclear(column, [e for block in blocks for _, e in block]):
            doubts[why].append(column.title)
    lines = [f"Pairs of rows in the paper's order, equal ones half: {'; '.join(counts)}."] if counts else []
    return lines + [f"No pair of {' or '.join(titles)} is called clear: {why}." for why, titles in doubts.items()]


def with_paper(table: Table, j: int) -> list[list[tuple[Row, Entry]]]:
    """The rows of a column that have our number and the paper's, by block."""
    both = [(row, e) for row in table.rows if (e := row.entries[j]).paper and e.mean is not None]
    return [list(block) for _, block in itertools.groupby(both, key=lambda side: side[0].labels[:-1])]


def of_column(table: Table, j: int) -> Agreement:
    """How far a column comes in the paper's order."""
    return count([[(float(e.text), e.paper.value) for _, e in block] for block in with_paper(table, j)])


def count(blocks: Iterable[Sequence[Pair]]) -> Agreement:
    """How many pairs of rows come in the paper's order."""
    same, pairs, variance = 0.0, 0, 0.0
    for block in blocks:
        for (ours, theirs), (other, paper) in itertools.combinations(block, 2):
            if theirs != paper:
                pairs += 1
                same += 0.5 if ours == other else (ours > other) == (theirs > paper)
        variance += kendall_variance(block) / 4
    return Agreement(same, pairs, pairs / 2, sqrt(variance))


def kendall_variance(block: Sequence[Pair]) -> float:
    """The variance of Kendall's S, concordant less discordant pairs, of random orders; both sides may have ties."""
    n = len(block)
    if n < 2:
        return 0.0
    ties = [Counter(side).values() for side in zip(*block, strict=True)]

    def over(f) -> list[float]:
        return [sum(map(f, sizes)) for sizes in ties]

    pairs, triples = over(lambda t: t * (t - 1)), over(lambda t: t * (t - 1) * (t - 2))
    plain = n * (n - 1) * (2 * n + 5) - sum(over(lambda t: t * (t - 1) * (2 * t + 5)))
    variance = plain / 18 + pairs[0] * pairs[1] / (2 * n * (n - 1))
    return variance + (triples[0] * triples[1] / (9 * n * (n - 1) * (n - 2)) if n > 2 else 0)


def clear(block: Sequence[tuple[Row, Entry]]) -> list[str]:
    """The pairs of a block that are clearly against the paper's order: "A over B"."""
    found = []
    for pair in itertools.combinations(block, 2):
        (above, high), (below, low) = sorted(pair, key=lambda side: -side[1].paper.value)
        if high.paper.value == low.paper.value or min(high.n, low.n) < SEEDS or None in (high.error, low.error):
            continue
        if low.mean - high.mean > high.spread + low.spread + high.error + low.error:
            found.append(f"{below.name} over {above.name}")
    return found


def unclear(column: Column, entries: Sequence[Entry]) -> str | None:
    """Why no pair of a column can be called clear; None: some can, or the column shows no deviations."""
    most = max((e.n for e in entries), default=0)
    if column.kind == "extra" or most < 2:
        return None
    if sum(e.n >= SEEDS for e in entries) < 2:
        return f"that takes {SEEDS} seeds, and here are {most}"
    if sum(e.error is not None for e in entries) < 2:
        return "the test set's share of the error is not known"
    return None
