"""One static page over all experiments: what was found first, then a card an experiment, then each with its table and
plots, the paper's numbers, runs and commands.

Self-contained: page.css and page.js lie inside it, the plots are SVG whose colours follow the theme, and its policy
lets a browser load or run nothing else. Without scripts it is a page to read; page.js sorts, filters, compares and
copies. Links go to the results, records and configurations beside it, relative to where it is written. What it takes
from READMEs: studies.py.
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
from recombine.report.page_cards import cards, index, todo
from recombine.report.page_compare import compare
from recombine.report.page_lead import leading, others
from recombine.report.page_markup import Markup, command, link, tag
from recombine.report.page_plots import plots, thumb
from recombine.report.page_sections import section
from recombine.report.studies import Said, Study, lead, said, studies
from recombine.runner import grid
from recombine.runner.grid import CONF
from recombine.runtime.atomic import atomic_write
from recombine.runtime.naming import sweep_folder

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
        temporary.write_text(html(reports, path.parent, studies()), encoding="utf-8")
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
            live = Path(sweep_folder(name, "")).exists()  # then all of its configuration tells whose results these are
            experiment = grid.load(name) if live else grid.read(name)
            if experiment.grid and experiment.report:  # others are single runs or shared parts
                yield build(experiment)
        except EXPECTED as error:
            yield Unread(name, one_line(error))


def html(reports: Sequence[Report | Unread], folder: Path, found: Sequence[Study] = ()) -> str:
    """The page. folder: where it will lie, which its links start from; found: what the READMEs say."""
    unread = [report for report in reports if isinstance(report, Unread)]
    readable = [report for report in reports if isinstance(report, Report)]
    started = [report for report in readable if report.runs.records or report.runs.failed or report.runs.unread]
    waiting = [report for report in readable if report not in started]
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    first, about = lead(found), said(found)
    thumbs, sections = {}, []
    for report in started:
        known = about.get(report.table.name) if report.committed else None
        boxes, thumbs[report.table.name] = drawings(report, known)
        sections.append(section(report, boxes, known, folder))
    failed = [broken(unread, runs_unread(reports))] if unread or runs_unread(reports) else []
    body = tag(
        "body",
        tag("header", tag("h1", "recombine: results"), tag("p", summary(readable, started))),
        index(started, first is not None),
        tag(
            "main",
            *([leading(first, folder)] if first else []),
            *failed,
            cards(started, thumbs),
            *([todo(waiting)] if waiting else []),
            *compare(started),
            *others([study for study in found if study is not first], folder),
            *sections,
        ),
        tag("footer", tag("p", f"Written on {date.today():%Y-%m-%d} by ", command("make report"))),
        tag("script", Markup(script)),
    )
    return "<!doctype html>\n" + tag("html", head(style, script), body, lang="en") + "\n"


def drawings(report: Report, known: Said | None) -> tuple[list[Markup], tuple[Markup, str] | None]:
    """An experiment's figures, or the line that says why they cannot be drawn, and the first of them in small."""
    try:
        drawn = plots(report, known)
    except UsageError as error:
        return [tag("p", one_line(error), class_="failed")], None
    return [plot.box for plot in drawn], thumb(report, drawn[0]) if drawn else None


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


def broken(unread: Sequence[Unread], runs: Sequence[Unread]) -> Markup:
    """The experiments and the runs that cannot be read, and why."""
    items = [tag("li", name, tag("br"), why, id=name, data_of=name) for name, why in unread]
    items += [tag("li", link(f"#{quote(name)}", name), tag("br"), why) for name, why in runs]
    title = tag("h2", "Cannot be read", id="unread")
    return tag("section", title, tag("ul", *items, class_="failed"), aria_labelledby="unread")
