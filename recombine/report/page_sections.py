"""What the page shows of one experiment: its table, notes, plots, failures and runs."""

from collections.abc import Sequence
from pathlib import Path

from recombine.errors import UsageError, one_line
from recombine.report import Report, words
from recombine.report.page_markup import Markup, command, link, relative, sheet, tag
from recombine.report.page_svg import svg
from recombine.report.records import RUNS, Record
from recombine.report.render import MISSING, ours, theirs
from recombine.report.table_data import Column, Entry, Measure, Table, measures, shown
from recombine.runner.grid import CONF


def section(report: Report, folder: Path) -> Markup:
    """An experiment of which something has been run."""
    table, name = report.table, report.table.name
    anchor = name.replace("/", "-")
    return tag(
        "section",
        tag("h2", table.title, id=f"{anchor}-title"),
        tag("p", name, *(part for file in files(report, folder) for part in (" · ", file)), class_="about"),
        tag("p", command(f"python run.py experiment={name}"), class_="line"),
        results(table),
        tag("ul", *(tag("li", note) for note in table.notes), class_="notes"),
        *plots(report),
        *failures(report),
        *details(report, folder),
        id=name,
        aria_labelledby=f"{anchor}-title",
    )


def results(table: Table) -> Markup:
    """The table: in each cell our number and below it the paper's."""
    heads = [tag("th", name, scope="col", class_="label") for name in table.heads]
    for column in table.columns:
        best = column.measure.best if column.measure else None
        heads.append(tag("th", column.title, scope="col", class_=column.kind, data_best=best))
    rows = []
    for row in table.rows:
        cells = [number(table, column, entry) for column, entry in zip(table.columns, row.entries, strict=True)]
        rows.append(tag("tr", *(tag("th", name, scope="row") for name in row.names), *cells))
    return sheet(table.title, heads, rows, "results")


def number(table: Table, column: Column, entry: Entry) -> Markup:
    """A cell of the table. A question mark explains itself where the paper's number is doubtful."""
    printed = Markup(ours(table, column, entry, lambda best: tag("strong", best)))  # digits and signs
    paper = theirs(table, entry)
    doubt = tag("abbr", "?", title=entry.paper.doubt) if paper and entry.paper.doubt else ""
    below = tag("small", "paper ", paper, doubt) if paper else ""
    if entry.mean is None:
        why = "not run, not all of it, or without this number"
        return tag("td", tag("span", printed, title=why), below, class_=f"{column.kind} missing")
    return tag(
        "td",
        printed,
        below,
        class_=f"{column.kind} best" if entry.best else column.kind,
        data_value=f"{entry.mean:.6g}",
    )


def plots(report: Report) -> list[Markup]:
    """The experiment's plots, or the line that says why they cannot be drawn."""
    spec = report.experiment.report.get("plots")
    if not spec or not report.runs.records:
        return []
    from recombine.report.plots import figures  # matplotlib takes a second

    try:
        drawn = figures(spec, report.runs)
    except UsageError as error:
        return [tag("p", one_line(error), class_="failed")]
    boxes = [
        tag("figure", tag("div", svg(figure, f"{report.table.name}/{name}")), tag("figcaption", words.caption(name)))
        for name, figure in drawn.items()
    ]
    return [tag("div", *boxes, class_="plots")] if boxes else []


def failures(report: Report) -> list[Markup]:
    """What failed, by its reason."""
    why: dict[str, list[str]] = {}
    for cell in report.experiment.cells:
        if cell.folder in report.runs.failed:
            why.setdefault(report.runs.failed[cell.folder], []).append(" / ".join(names(cell.labels)))
    if not why:
        return []
    lines = [
        tag("li", tag("b", f"{len(cells)} failed: "), reason, tag("br"), some(cells)) for reason, cells in why.items()
    ]
    again = command(f"python run.py experiment={report.table.name} retry=true")
    return [tag("div", tag("ul", *lines), tag("p", "Run them again: ", again, class_="line"), class_="failed")]


def details(report: Report, folder: Path) -> list[Markup]:
    """Every run: its labels, what the table takes from it, its result and the command that repeats it."""
    if not (runs := report.runs.records):
        return []
    measured = measures(report.experiment.report, "values", "extra")
    heads = [tag("th", words.heading(axis), scope="col", class_="label") for axis in runs[0].labels]
    heads += [tag("th", m.label, scope="col", data_best=m.best) for m in measured]
    heads += [tag("th", title, scope="col") for title in ("seconds", "result", "command")]
    rows = []
    for record in runs:
        cells = [tag("th", name, scope="row") for name in names(record.labels)]
        cells += [plain(m.of(record), m) for m in measured]
        cells += [plain(record.get("seconds.total"), Measure("", "")), tag("td", source(report, record, folder))]
        rows.append(tag("tr", *cells, repeat(report, record)))
    title = f"{len(runs)} run{'s' if len(runs) > 1 else ''}: numbers, results, commands"
    return [tag("details", tag("summary", title), sheet(f"runs of {report.table.name}", heads, rows, "each"))]


def names(labels: dict[str, str]) -> list[str]:
    """A run's labels, in words."""
    return [words.label(axis, label) for axis, label in labels.items()]


def plain(value: float | None, m: Measure) -> Markup:
    """A cell with a run's own number."""
    return (
        tag("td", MISSING, class_="missing")
        if value is None
        else tag("td", shown(value, m.digits), data_value=f"{value:.6g}")
    )


def source(report: Report, record: Record, folder: Path) -> Markup | str:
    """A link to the run's result.json; `committed` where only its record is left."""
    path = report.experiment.folder / record.cell / "result.json"
    return link(relative(path, folder), "JSON") if path.is_file() else "committed"


def repeat(report: Report, record: Record) -> Markup:
    """A cell with the command that repeats the run."""
    return tag("td", command(record.result.get("command") or f"python run.py experiment={report.table.name}"))


def todo(waiting: Sequence[Report]) -> Markup:
    """The experiments that have not been started, with their commands."""
    items = []
    for report in waiting:
        table = report.table
        runs = f"{table.total} run{'s' if table.total > 1 else ''}: "
        start = tag("p", runs, command(f"python run.py experiment={table.name}"), class_="line")
        items.append(tag("li", table.title, start, id=table.name))
    title = tag("h2", "Not run yet", id="not-run")
    return tag("section", title, tag("ul", *items, class_="todo"), aria_labelledby="not-run")


def files(report: Report, folder: Path) -> list[Markup]:
    """Links to what there is of an experiment: its configuration, its evidence, the paper's numbers."""
    paths = [CONF / "experiment" / f"{report.table.name}.yaml"]
    paths += [report.folder / name for name in (RUNS, "table.csv", "table.md", "table.tex")]
    if paper := report.experiment.report.get("paper"):
        paths.append(CONF.parent / paper["file"])
    return [link(relative(path, folder), path.name) for path in paths if path.is_file()]


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
