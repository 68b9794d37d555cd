"""What the page needs to compare two methods: every task of every experiment that has both. page.js does the rest."""

import json
from collections.abc import Sequence

from recombine.report import Report
from recombine.report.page_markup import Markup, tag
from recombine.report.render import ours
from recombine.report.table_data import Table
from recombine.report.ties import margin

RULE = (
    "One is better where the means differ by more than both standard deviations over the seeds and both standard "
    "errors of the test sets together; else the two are level. Where one of these is not known, larger differences say "
    "nothing. With two seeds chance alone exceeds them too often, so nothing of two seeds is called clear."
)


def short(table: Table) -> tuple[str, str]:
    """(what of which paper, what it is about) of a title: "CERSA Tab. 9 in small: DINOv2 ..."."""
    about, _, what = table.title.partition(": ")
    return (about, what) if what else (table.name, about)


def places(started: Sequence[Report]) -> list[dict]:
    """A place is a column of a table whose rows are methods: {of, where, what, best, rows:
    {name: [mean, margin as in ties.py, text, seeds, whether all of that is known]}}."""
    found = []
    for report in started:
        table = report.table
        if "method" not in table.axes:
            continue
        for j, column in enumerate(table.columns):
            if column.kind != "cell" or not column.measure or not column.measure.best:
                continue
            entries = {row.name: row.entries[j] for row in table.rows if row.entries[j].mean is not None}
            rows = {
                name: [
                    round(e.mean, 6),
                    round(margin(e), 6),
                    ours(table, column, e, str),
                    e.n,
                    None not in (e.spread, e.error),
                ]
                for name, e in entries.items()
            }
            if len(rows) > 1:
                found.append({"of": table.name, "where": short(table)[0], "what": column.title, "rows": rows})
                found[-1]["best"] = column.measure.best
    return found


def compare(started: Sequence[Report]) -> list[Markup]:
    """The section that page.js fills and shows, with its numbers; nothing where there is nothing to compare."""
    if not (found := places(started)):
        return []
    data = json.dumps(found, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return [
        tag(
            "section",
            tag("h2", "Compare two methods over all tasks", id="compare-title"),
            tag("p", RULE, class_="about"),
            tag("script", Markup(data), type="application/json", id="places"),
            id="compare",
            aria_labelledby="compare-title",
            hidden="",
        )
    ]
