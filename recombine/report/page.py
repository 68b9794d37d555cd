"""One static page over all experiments: an index, every table with the paper's numbers, plots, runs and commands.

Self-contained: page.css and page.js lie inside it, the plots are SVG whose colours follow the theme, and its policy
lets a browser load or run nothing else. Without scripts it is a page to read; page.js sorts, filters and copies. Links
go to the results, records and configurations beside it, relative to where it is written.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from recombine.errors import EXPECTED, UsageError, one_line
from recombine.report import Report, build
from recombine.report.page_markup import Markup, command, link, sheet, tag
from recombine.report.page_sections import section, todo
from recombine.report.render import MISSING
from recombine.runner import grid
from recombine.runner.grid import CONF
from recombine.runtime.atomic import atomic_write

HERE = Path(__file__).parent


class Unread(NamedTuple):
    """An experiment that has no report because a file of it cannot be read, or a run without its result."""

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
    with atomic_write(path) as temporary:
        temporary.write_text(html(reports, path.parent), encoding="utf-8")
    return [report for report in reports if isinstance(report, Unread)] + runs_unread(reports)


def runs_unread(reports: Sequence[Report | Unread]) -> list[Unread]:
    """The runs of readable experiments whose results cannot be read."""
    readable = [report for report in reports if isinstance(report, Report)]
    return [Unread(report.table.name, why) for report in readable for why in report.runs.unread.values()]


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
    unread = [report for report in reports if isinstance(report, Unread)]
    readable = [report for report in reports if isinstance(report, Report)]
    started = [report for report in readable if report.runs.records or report.runs.failed or report.runs.unread]
    waiting = [report for report in readable if report not in started]
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    body = tag(
        "body",
        tag("header", tag("h1", "recombine: results"), tag("p", summary(readable, started))),
        tag(
            "main",
            index([*started, *waiting], unread),
            *(section(report, folder) for report in started),
            *([todo(waiting)] if waiting else []),
            *([broken(unread, runs_unread(reports))] if unread or runs_unread(reports) else []),
        ),
        tag("footer", tag("p", f"Written on {date.today():%Y-%m-%d} by ", command("make report"))),
        tag("script", Markup(script)),
    )
    return "<!doctype html>\n" + tag("html", head(style, script), body, lang="en") + "\n"


def head(style: str, script: str) -> Markup:
    """The page's head, with a policy that lets a browser run this script and load nothing else."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", "recombine: results"),
        tag("style", Markup(style)),
    )


def summary(readable: Sequence[Report], started: Sequence[Report]) -> str:
    """One line: how many experiments and runs there are, and how many failed."""
    done, total = (sum(getattr(report.table, key) for report in readable) for key in ("done", "total"))
    failed = sum(len(report.runs.failed) for report in readable)
    line = f"{len(started)} of {len(readable)} experiments have been started; {done:,} of {total:,} runs are done"
    return line + (f", {failed:,} failed." if failed else ".")


def index(readable: Sequence[Report], unread: Sequence[Unread]) -> Markup:
    """The table at the top, a row an experiment."""
    rows = []
    for report in readable:
        table = report.table
        about, _, what = table.title.partition(": ") if ": " in table.title else ("", "", table.title)
        rows.append(
            tag(
                "tr",
                tag("th", link(f"#{quote(table.name)}", table.name), scope="row"),
                tag("td", about),
                tag("td", what),
                tag("td", *state(report), data_value=table.done / table.total, class_="runs"),
            )
        )
    for name, _ in unread:
        cells = tag("td"), tag("td", "cannot be read"), tag("td", MISSING, class_="runs")
        rows.append(tag("tr", tag("th", link(f"#{quote(name)}", name), scope="row"), *cells))
    heads = [tag("th", title, scope="col") for title in ("Experiment", "Table", "What", "Runs")]
    title = tag("h2", "Experiments", id="experiments")
    return tag("nav", title, sheet("experiments", heads, rows, "index"), aria_labelledby="experiments")


def state(report: Report) -> list[str]:
    """How many runs are done, as a bar and in words; no bar where nothing has been started."""
    table, failed = report.table, len(report.runs.failed)
    if not table.done and not failed:
        return [f"0 of {table.total}"]
    bar = tag("progress", value=table.done, max=table.total, aria_label=f"runs of {table.name}")
    return [bar, f" {table.done} of {table.total}" + (f", {failed} failed" if failed else "")]


def broken(unread: Sequence[Unread], runs: Sequence[Unread]) -> Markup:
    """The experiments and the runs that cannot be read, and why."""
    items = [tag("li", name, tag("br"), why, id=name) for name, why in unread]
    items += [tag("li", link(f"#{quote(name)}", name), tag("br"), why) for name, why in runs]
    title = tag("h2", "Cannot be read", id="unread")
    return tag("section", title, tag("ul", *items, class_="failed"), aria_labelledby="unread")
