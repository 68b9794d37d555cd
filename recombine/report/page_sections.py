"""What the page shows of one experiment: what is known of it, its table beside its plots, notes, failures and runs."""

from collections.abc import Sequence
from pathlib import Path

from recombine.report import Report, words
from recombine.report.page_inline import inline
from recombine.report.page_markup import Markup, command, link, relative, sheet, tag
from recombine.report.records import RUNS, Record
from recombine.report.render import MISSING, ours, theirs
from recombine.report.studies import Said
from recombine.report.table_data import Column, Entry, Measure, Table, measures, shown
from recombine.report.ties import ties
from recombine.runner.grid import CONF


def section(report: Report, plots: Sequence[Markup], said: Said | None, folder: Path) -> Markup:
    """An experiment of which something has been run.

    Args:
        plots: its figures.
        said: what the READMEs say of these very runs.
        folder: where the page will lie.
    """
    table, name = report.table, report.table.name
    anchor = name.replace("/", "-")
    texts = [tag("p", *inline(line, said.base, folder), class_="said") for line in said.texts] if said else []
    beside = [tag("div", *plots, class_="plots")] if plots else []
    return tag(
        "section",
        tag("h2", table.title, id=f"{anchor}-title"),
        tag("p", name, *(part for file in files(report, folder) for part in (" · ", file)), class_="about"),
        tag("p", command(f"python run.py experiment={name}"), class_="line"),
        *texts,
        tag("div", results(table), *beside, class_="both"),
        tag("ul", *(tag("li", note) for note in table.notes), class_="notes"),
        *failures(report),
        *details(report, folder),
        tag("p", link("#experiments", "↑ All experiments"), class_="about"),
        id=name,
        aria_labelledby=f"{anchor}-title",
        data_of=name,
    )


def results(table: Table) -> Markup:
    """The table: in each cell our number and below it the paper's."""
    heads = [tag("th", name, scope="col", class_="label") for name in table.heads]
    for column in table.columns:
        best = column.measure.best if column.measure else None
        heads.append(tag("th", column.title, scope="col", class_=column.kind, data_best=best))
    rows, tied = [], [ties(table, j) for j in range(len(table.columns))]
    for i, row in enumerate(table.rows):
        cells = [number(table, table.columns[j], entry, i in tied[j]) for j, entry in enumerate(row.entries)]
        rows.append(tag("tr", *(tag("th", name, scope="row") for name in row.names), *cells))
    return sheet(table.title, heads, rows, "results")


def number(table: Table, column: Column, entry: Entry, tied: bool) -> Markup:
    """A cell of the table. A question mark explains itself where the paper's number is doubtful. tied: level with the
    best, or the best and not alone."""
    printed = Markup(ours(table, column, entry, lambda best: best if tied else tag("strong", best)))  # digits and signs
    paper = theirs(table, entry)
    doubt = tag("abbr", "?", title=entry.paper.doubt) if paper and entry.paper.doubt else ""
    far = (
        {}
        if table.compares
        else {"class_": "far", "title": "another model and data: compare the order of the rows only"}
    )
    below = tag("small", "paper ", paper, doubt, **far) if paper else ""
    if entry.mean is None:
        why = "not run, not all of it, or without this number"
        return tag("td", tag("span", printed, title=why), below, class_=f"{column.kind} missing")
    mark = "tied" if tied else "best" if entry.best else ""
    why = "level with the best: within both standard deviations and test errors" if tied else None
    equal = Markup('<abbr class="tie">=</abbr>') if tied else ""
    kinds = f"{column.kind} {mark}".strip()
    return tag("td", printed, equal, below, class_=kinds, title=why, data_value=f"{entry.mean:.6g}")


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
