"""One static page over all experiments: an index, every table with the paper's numbers, plots, runs and commands.

Self-contained: page.css and page.js lie inside it, the plots are SVG whose colours follow the theme, and its policy
lets a browser load or run nothing else. Without scripts it is a page to read; page.js sorts, filters and copies. Links
go to the results, records and configurations beside it, relative to where it is written.
"""

import base64
import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from datetime import date
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from recombine.errors import EXPECTED, UsageError, one_line
from recombine.report import Report, build
from recombine.report.records import RUNS, Record
from recombine.report.render import MISSING, ours, theirs
from recombine.report.table import Entry, Measure, Table, measure, shown
from recombine.runner import grid
from recombine.runner.grid import CONF
from recombine.runtime.atomic import replacing

HERE = Path(__file__).parent
THEMED = {  # colours of a plot that are not data -> what page.css calls them
    "#000000": "var(--ink)",
    "#333333": "var(--ink)",
    "#555555": "var(--dim)",
    "#dddddd": "var(--bar)",
    "#e6e6e6": "var(--line)",
    "#ffffff": "var(--paper)",
    "white": "var(--paper)",
}


class Markup(str):
    """HTML; every other string is text, which `tag` escapes."""


class Unread(NamedTuple):
    """An experiment that has no report because a file of it cannot be read."""

    name: str
    why: str


def write(path: Path) -> list[Unread]:
    """Writes the page over all of conf/experiment to `path`; what could not be read is on it, and returned.

    Raises:
        UsageError: the path is no page's, or cannot be written.
    """
    if path.suffix != ".html":
        raise UsageError(f"--page {path}: must end in .html, for example outputs/report.html")
    reports = list(read())
    with replacing(path) as temporary:
        temporary.write_text(html(reports, path.parent), encoding="utf-8")
    return [report for report in reports if isinstance(report, Unread)]


def read() -> Iterable[Report | Unread]:
    """The report of every experiment that has one, by name."""
    root = CONF / "experiment"
    for name in sorted(str(path.relative_to(root).with_suffix("")) for path in root.glob("**/*.yaml")):
        try:
            experiment = grid.load(name)
            if experiment.grid and experiment.report:  # others are single runs or shared parts
                yield build(experiment)
        except EXPECTED as error:
            yield Unread(name, one_line(error))


def html(reports: Sequence[Report | Unread], folder: Path) -> str:
    """The page. folder: where it will lie, which its links start from."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    unread = [report for report in reports if isinstance(report, Unread)]
    made = [report for report in reports if isinstance(report, Report)]
    run = [report for report in made if report.runs.records or report.runs.failed]
    waiting = [report for report in made if report not in run]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", "recombine: results"),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag("header", tag("h1", "recombine: results"), tag("p", summary(made, run))),
        tag(
            "main",
            index([*run, *waiting], unread),
            *(section(report, folder) for report in run),
            *([todo(waiting)] if waiting else []),
            *([broken(unread)] if unread else []),
        ),
        tag("footer", tag("p", f"Written on {date.today():%Y-%m-%d} by ", command("make report"))),
        tag("script", Markup(script)),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


# the page's parts


def summary(made: Sequence[Report], run: Sequence[Report]) -> str:
    done, total = (sum(getattr(report.table, key) for report in made) for key in ("done", "total"))
    failed = sum(len(report.runs.failed) for report in made)
    lead = f"{len(run)} of {len(made)} experiments have been started; {done:,} of {total:,} runs are done"
    return lead + (f", {failed:,} failed." if failed else ".")


def index(made: Sequence[Report], unread: Sequence[Unread]) -> Markup:
    rows = []
    for report in made:
        table, failed = report.table, len(report.runs.failed)
        about, _, what = table.title.partition(": ") if ": " in table.title else ("", "", table.title)
        bar = tag("progress", value=table.done, max=table.total, aria_label=f"runs of {table.name}")
        note = f", {failed} failed" if failed else ""
        state = [bar, f" {table.done} of {table.total}{note}"] if table.done or failed else [f"0 of {table.total}"]
        rows.append(
            tag(
                "tr",
                tag("th", link(f"#{quote(table.name)}", table.name), scope="row"),
                tag("td", about),
                tag("td", what),
                tag("td", *state, data_value=table.done / table.total, class_="runs"),
            )
        )
    for name, _ in unread:
        cells = tag("td"), tag("td", "cannot be read"), tag("td", MISSING, class_="runs")
        rows.append(tag("tr", tag("th", link(f"#{quote(name)}", name), scope="row"), *cells))
    heads = [tag("th", title, scope="col") for title in ("Experiment", "Table", "What", "Runs")]
    title = tag("h2", "Experiments", id="experiments")
    return tag("nav", title, sheet("experiments", heads, rows, "index"), aria_labelledby="experiments")


def section(report: Report, folder: Path) -> Markup:
    """An experiment of which something has been run."""
    table, name = report.table, report.table.name
    plain = name.replace("/", "-")
    return tag(
        "section",
        tag("h2", table.title, id=f"{plain}-title"),
        tag("p", name, *(part for one in files(report, folder) for part in (" · ", one)), class_="about"),
        tag("p", command(f"python run.py experiment={name}"), class_="line"),
        results(table),
        tag("ul", *(tag("li", note) for note in table.notes), class_="notes"),
        *plots(report),
        *failures(report),
        *details(report, folder),
        id=name,
        aria_labelledby=f"{plain}-title",
    )


def results(table: Table) -> Markup:
    """The table: in each cell our number and below it the paper's."""
    heads = [tag("th", axis, scope="col", class_="label") for axis in table.axes]
    for column in table.columns:
        best = column.measure.best if column.measure else None
        heads.append(tag("th", column.title, scope="col", class_=column.kind, data_best=best))
    rows = []
    for row in table.rows:
        both = zip(table.columns, row.entries, strict=True)
        cells = [number(table, column, entry) for column, entry in both]
        rows.append(tag("tr", *(tag("th", label, scope="row") for label in row.labels), *cells))
    return sheet(table.title, heads, rows, "results")


def number(table: Table, column: Any, entry: Entry) -> Markup:
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
    spec = report.experiment.report.get("plots")
    if not spec or not report.runs.records:
        return []
    from recombine.report.plots import figures  # matplotlib takes a second

    try:
        made = figures(spec, report.runs)
    except UsageError as error:
        return [tag("p", one_line(error), class_="failed")]
    shown = [
        tag("figure", tag("div", svg(figure, f"{report.table.name}/{name}")), tag("figcaption", name))
        for name, figure in made.items()
    ]
    return [tag("div", *shown, class_="plots")] if shown else []


def svg(figure: Any, name: str) -> Markup:
    """A figure as SVG that can stand in a page beside others: ids of its own, text as text, the page's colours."""
    import matplotlib

    out = io.StringIO()
    for text in figure.findobj(lambda artist: artist.get_path_effects()):  # would be drawn as outlines
        text.set_path_effects([])
        text.set_gid("halo")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.S)  # would hold for the whole page
    drawn = re.sub(r' id="[\w.]+_\d+"', "", drawn)  # figure_1 and its like, in every figure
    drawn = drawn.replace(' id="halo"', ' class="halo"')
    drawn = re.sub(r' transform="rotate\(-0 [^"]*"|(?<=style=")[^"]*', lambda found: themed(found[0]), drawn)
    drawn = re.sub(r'(?<= (?:d|x|y)=")[^"]*', lambda found: re.sub(r"(\.\d\d)\d+|\s+$", r"\1", found[0]), drawn)
    shape = "wide" if figure.get_figwidth() > 6 else "narrow"  # of several panels, or of one
    label = escape(f"plot {name}")
    return Markup(
        re.sub(r"\n\s*", "\n", drawn).replace("<svg ", f'<svg class="{shape}" role="img" aria-label="{label}" ', 1)
    )


def themed(style: str) -> str:
    """The colours of a style as the page has them; the font is the page's too."""
    style = re.sub(r" font-family: [^;]*;", "", style)
    return re.sub(r"#[0-9a-f]{6}|\bwhite\b", lambda colour: THEMED.get(colour[0]) or legible(colour[0]), style)


def legible(colour: str) -> str:
    """A colour of data, made lighter for the dark page where it would be lost there: to the luminance 0.18."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    for share in range(0, 100, 5):
        mixed = [c + (1 - c) * share / 100 for c in channels]
        if sum(weight * c**2.2 for weight, c in zip((0.21, 0.72, 0.07), mixed, strict=True)) >= 0.18:
            break
    lighter = "#" + "".join(f"{round(255 * c):02x}" for c in mixed)
    return colour if lighter == colour else f"light-dark({colour}, {lighter})"


def failures(report: Report) -> list[Markup]:
    """What failed, by its reason."""
    why: dict[str, list[str]] = {}
    for cell in report.experiment.cells:
        if cell.folder in report.runs.failed:
            why.setdefault(report.runs.failed[cell.folder], []).append(" / ".join(cell.labels.values()))
    if not why:
        return []
    lines = [
        tag("li", tag("b", f"{len(names)} failed: "), reason, tag("br"), some(names)) for reason, names in why.items()
    ]
    again = command(f"python run.py experiment={report.table.name} retry=true")
    return [tag("div", tag("ul", *lines), tag("p", "Run them again: ", again, class_="line"), class_="failed")]


def details(report: Report, folder: Path) -> list[Markup]:
    """Every run: its labels, what the table takes from it, its result and the command that repeats it."""
    found = report.runs.records
    if not found:
        return []
    spec = report.experiment.report
    measures = [measure(label, m) for key in ("values", "extra") for label, m in (spec.get(key) or {}).items()]
    heads = [tag("th", axis, scope="col", class_="label") for axis in found[0].labels]
    heads += [tag("th", m.label, scope="col", data_best=m.best) for m in measures]
    heads += [tag("th", title, scope="col") for title in ("seconds", "result", "command")]
    rows = []
    for record in found:
        labels = [tag("th", label, scope="row") for label in record.labels.values()]
        numbers = [one(m.of(record), m) for m in measures]
        seconds = one(record.get("seconds.total"), Measure("", ""))
        rows.append(
            tag("tr", *labels, *numbers, seconds, tag("td", source(report, record, folder)), repeat(report, record))
        )
    title = f"{len(found)} run{'s' if len(found) > 1 else ''}: numbers, results, commands"
    return [tag("details", tag("summary", title), sheet(f"runs of {report.table.name}", heads, rows, "each"))]


def one(value: float | None, m: Measure) -> Markup:
    return (
        tag("td", MISSING, class_="missing")
        if value is None
        else tag("td", shown(value, m.digits), data_value=f"{value:.6g}")
    )


def source(report: Report, record: Record, folder: Path) -> Markup | str:
    path = report.experiment.folder / record.cell / "result.json"
    return link(relative(path, folder), "JSON") if path.is_file() else "committed"


def repeat(report: Report, record: Record) -> Markup:
    return tag("td", command(record.result.get("command") or f"python run.py experiment={report.table.name}"))


def todo(waiting: Sequence[Report]) -> Markup:
    items = []
    for report in waiting:
        table = report.table
        runs = f"{table.total} run{'s' if table.total > 1 else ''}: "
        start = tag("p", runs, command(f"python run.py experiment={table.name}"), class_="line")
        items.append(tag("li", table.title, start, id=table.name))
    title = tag("h2", "Not run yet", id="not-run")
    return tag("section", title, tag("ul", *items, class_="todo"), aria_labelledby="not-run")


def broken(unread: Sequence[Unread]) -> Markup:
    items = [tag("li", name, tag("br"), why, id=name) for name, why in unread]
    title = tag("h2", "Cannot be read", id="unread")
    return tag("section", title, tag("ul", *items, class_="failed"), aria_labelledby="unread")


# what they are made of


def files(report: Report, folder: Path) -> list[Markup]:
    """Links to what there is of an experiment: its configuration, its evidence, the paper's numbers."""
    paths = [CONF / "experiment" / f"{report.table.name}.yaml"]
    paths += [report.folder / name for name in (RUNS, "table.csv", "table.md", "table.tex")]
    if paper := report.experiment.report.get("paper"):
        paths.append(CONF.parent / paper["file"])
    return [link(relative(path, folder), path.name) for path in paths if path.is_file()]


def sheet(name: str, heads: Sequence[Markup], rows: Sequence[Markup], kind: str) -> Markup:
    """A table that scrolls by itself where it is too wide."""
    caption = tag("caption", name, class_="unseen")
    inside = tag("table", caption, tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_=kind)
    return tag("div", inside, class_="sheet", role="region", aria_label=name, tabindex=0)


def command(line: str) -> Markup:
    return tag("code", line, class_="command")


def link(address: str, content: str) -> Markup:
    return tag("a", content, href=address)


def relative(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())


def some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def tag(name: str, /, *inside: str, **attributes: Any) -> Markup:
    """An element. Text and attributes are escaped; class_ is class, data_value data-value; None is left out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = f"<{name}" + "".join(f' {key}="{escape(str(value))}"' for key, value in given.items()) + ">"
    if name in ("meta", "br"):
        return Markup(opening)
    content = "".join(part if isinstance(part, Markup) else escape(part, quote=False) for part in inside)
    return Markup(f"{opening}{content}</{name}>" + ("\n" if name in ("tr", "li", "table", "figure", "section") else ""))
