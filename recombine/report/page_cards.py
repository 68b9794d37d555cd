"""The experiments at a glance: a card each with a thumbnail, the best row and how far it agrees with the paper; the
sticky index; and one folded line of what has not run."""

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from recombine.report import Report, agreement, page_bars
from recombine.report.page_compare import places, short
from recombine.report.page_inline import spoken
from recombine.report.page_markup import Markup, command, link, tag
from recombine.report.render import ours
from recombine.report.table_data import Table
from recombine.report.ties import level, main

LEVEL = (
    "Level, = in the tables: not told apart from the best, as the means differ by no more than both standard "
    "deviations over the seeds and both standard errors of the test sets together."
)


def index(started: Sequence[Report], lead: bool) -> Markup:
    """Links to every section, which stay in sight. lead: there is a first screen."""
    fixed = [("#lead", "Findings")] * lead + [("#experiments", "All experiments")]
    fixed += [("#compare", "Compare two")] if places(started) else []
    links = [tag("li", link(address, words)) for address, words in fixed]
    for report in started:
        words = short(report.table)[0].replace(" in small", "").rstrip(", ")
        links.append(tag("li", link(f"#{quote(report.table.name)}", words), data_of=report.table.name))
    return tag("nav", tag("ul", *links), class_="contents", aria_label="Contents")


def cards(started: Sequence[Report], thumbs: Mapping[str, tuple[Markup, str] | None]) -> Markup:
    """A card an experiment. thumbs: name of an experiment -> its plot in small and what that shows; others get bars."""
    items = [card(report, thumbs.get(report.table.name)) for report in started]
    return tag(
        "section",
        tag("h2", "Experiments", id="experiments-title"),
        tag("p", LEVEL, class_="about"),
        tag("ul", *items, class_="cards"),
        id="experiments",
        aria_labelledby="experiments-title",
    )


def card(report: Report, small: tuple[Markup, str] | None) -> Markup:
    """One experiment at a glance."""
    table = report.table
    about, what = short(table)
    picture, shows = small or (bars(table), "")
    said = (("best", best(table) or shows), ("order", order(table)))
    lines = [tag("p", spoken(line), class_=kind) for kind, line in said if line]
    if table.done < table.total or report.runs.failed:
        failed = f", {len(report.runs.failed)} failed" if report.runs.failed else ""
        lines.append(tag("p", f"{table.done} of {table.total} runs{failed}", class_="runs"))
    name = tag("h3", link(f"#{quote(table.name)}", about))
    return tag("li", *([picture] if picture else []), name, tag("p", what, class_="about"), *lines, data_of=table.name)


def best(table: Table) -> str:
    """The best row of the column that says most, and which are level with it."""
    if (j := main(table)) is None:
        return ""
    column = table.columns[j]
    rows = [row for row in table.rows if row.entries[j].mean is not None]
    if len(rows) < 2:
        return ""
    most = column.measure.best == "max"
    first = (max if most else min)(rows, key=lambda row: row.entries[j].mean)
    what = "" if column.title == "mean" else f", {column.title}"
    line = f"{'Highest' if most else 'Lowest'}: {first.name}, {ours(table, column, first.entries[j], str)}{what}; "
    others = [row for row in rows if row is not first]
    same = [row.name for row in others if level(row.entries[j], first.entries[j])]
    if same:
        named = ", ".join(same[:3]) + (f" and {len(same) - 3} more" if len(same) > 3 else "")
        return line + ("level with all others." if len(same) == len(others) > 1 else f"level with it: {named}.")
    seeds = min(row.entries[j].n for row in rows)
    if None in [row.entries[j].spread for row in rows]:
        return line + "of one run each."
    if None in [row.entries[j].error for row in rows]:
        return line + "outside the seeds' deviations, but the test set's error is not known."
    return line + (
        "clear of the others." if seeds >= agreement.SEEDS else f"outside the others' errors, of {seeds} seeds."
    )


def order(table: Table) -> str:
    """How many pairs of rows come in the paper's order, beside what chance gives: in the column that says most, or else
    in the first that the paper has numbers for."""
    first = main(table)
    for j in dict.fromkeys([*([] if first is None else [first]), *range(len(table.columns))]):
        found = agreement.of_column(table, j)
        if found.pairs:
            where = "" if j == first else f" ({table.columns[j].title})"
            chance = f"chance gives {found.mean:g} ± {found.deviation:.1f}"
            return f"{found.same:g} of {found.pairs} pairs in the paper's order{where}; {chance}."
    return ""


def bars(table: Table) -> Markup | None:
    """A thumbnail of a table without a plot: the column that says most."""
    j = main(table)
    values = (
        {i: row.entries[j].mean for i, row in enumerate(table.rows) if row.entries[j].mean is not None}
        if (j is not None)
        else {}
    )
    if not values:
        return None
    return page_bars.thumb(list(values.values()), {k for k, i in enumerate(values) if table.rows[i].entries[j].best})


def todo(waiting: Sequence[Report]) -> Markup:
    """One folded line: the experiments that have not been started, with their commands."""
    items = []
    for report in waiting:
        table = report.table
        runs = f"{table.total} run{'s' if table.total > 1 else ''}: "
        start = tag("p", runs, command(f"python run.py experiment={table.name}"), class_="line")
        items.append(tag("li", table.title, start, id=table.name, data_of=table.name))
    runs = sum(report.table.total for report in waiting)
    several = "s have" if len(waiting) > 1 else " has"
    title = tag("summary", f"{len(waiting)} experiment{several} not been run ({runs:,} runs)")
    return tag("details", title, tag("ul", *items, class_="todo"), id="not-run")
