"""The lines below a table: how many runs it rests on, how its rows compare with the paper's, what is doubtful."""

from collections.abc import Mapping
from typing import Any

from recombine.report import records, words
from recombine.report.agreement import agreement
from recombine.report.paper import Paper
from recombine.report.records import Runs
from recombine.report.table_data import Table, measures


def notes(table: Table, report: Mapping[str, Any], runs: Runs, paper: Paper | None) -> list[str]:
    """All the lines. report: the experiment's `report`, whose own notes stand last."""
    lines = [counts(table, runs)]
    most = max((e.n for e in table.scores), default=0)
    if most > 1 or not table.even:
        over = "the seeds" if table.replicates == ("seed",) else " and ".join(map(words.heading, table.replicates))
        n = f"n = {most}" if table.even else "n in brackets where runs are missing"
        lines.append(f"Mean ± sample standard deviation over {over} ({n}).")
    for m in measures(report, "values", "extra"):
        if lack := sum(m.of(record) is None for record in runs.records):
            lines.append(f"{m.label} ({m.key}): no number in {lack} of {table.done} runs.")
    if paper:
        lines += [source(paper), *agreement(table), *doubts(table)]
    if warning := records.provenance(runs.records):
        lines.append(warning)
    return lines + [str(line) for line in report.get("notes") or []]


def counts(table: Table, runs: Runs) -> str:
    """How many runs there are, and what became of the others."""
    line = f"{table.done} of {table.total} runs."
    committed = sum("cell" in record.result for record in runs.records)
    if 0 < committed < table.done:
        line += f" {committed} of them are from the committed runs.jsonl."
    if runs.other:
        line += f" Left out: {len(runs.other)} of another configuration ({next(iter(runs.other.values()))})."
    if runs.unread:
        line += f" {len(runs.unread)} cannot be read: {'; '.join(runs.unread.values())}."
    if runs.failed:
        reasons = list(dict.fromkeys(runs.failed.values()))
        line += f" {len(runs.failed)} failed: {'; '.join(reasons[:3])}{'; ...' if len(reasons) > 3 else ''}."
    return line


def source(paper: Paper) -> str:
    """Where the paper's numbers stand and what a comparison with them means."""
    how = "the difference in brackets is ours minus the paper's"
    if not paper.compares:
        how = "its setting differs, so compare the order of the rows and not the numbers"
    return f"Paper: {paper.spec['file']}; {how}."


def doubts(table: Table, most: int = 6) -> list[str]:
    """Why some of the paper's numbers that stand in the table are doubtful."""
    places: dict[str, list[str]] = {}  # reason -> entries
    for row in table.rows:
        for column, e in zip(table.columns, row.entries, strict=True):
            if e.paper and e.paper.doubt:
                places.setdefault(e.paper.doubt, []).append(f"{row.name}, {column.title}")
    lines = []
    for why, where in places.items():
        others = " and others" if len(set(where)) > 1 else ""
        lines.append(f"The paper's {where[0]}{others}: {why}.")
    return lines[:most] + ([f"{len(lines) - most} more doubts are in the file."] if len(lines) > most else [])
