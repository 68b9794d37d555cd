"""The plots of an experiment on the page: its committed SVG files where they show these records, else drawn anew."""

from typing import NamedTuple

from recombine.report import Report, drawn, page_svg, words
from recombine.report.page_inline import plain
from recombine.report.page_markup import Markup, tag
from recombine.report.studies import Said


class Plot(NamedTuple):
    """name: as the YAML calls it; caption: what it shows; picture: its SVG; box: that with its caption."""

    name: str
    caption: str
    picture: Markup
    box: Markup


def plots(report: Report, said: Said | None) -> list[Plot]:
    """The experiment's plots.

    Args:
        said: what the READMEs say of these very runs: the sentence that links to a plot is its caption.

    Raises:
        UsageError: the YAML's `plots` cannot be drawn.
    """
    found = []
    for name, text in texts(report).items():
        caption = said.captions.get(name) if said else None
        caption = caption or words.caption(name)
        picture = page_svg.svg(text, f"{report.table.name}-{name}", f"plot: {caption}")
        found.append(Plot(name, caption, picture, tag("figure", tag("div", picture), plain(caption))))
    return found


def texts(report: Report) -> dict[str, str]:
    """Name of a plot -> its SVG; what no record has numbers for is left out."""
    spec = report.experiment.report.get("plots") or {}
    if not report.runs.records:
        return {}
    found = {}
    for name, given in spec.items():
        text = drawn.kept(report.folder / f"{name}.svg", drawn.digest(name, given, report.runs))
        if text is None:
            from recombine.report import plots as drawing  # matplotlib takes a second

            for figure in drawing.figures({name: given}, report.runs).values():
                text = drawing.as_svg(figure, name)
        if text is not None:
            found[name] = text
    return found


def thumb(report: Report, plot: Plot) -> tuple[Markup, str]:
    """A plot in small, and what it shows."""
    return page_svg.thumb(plot.picture, f"{report.table.name}-{plot.name}"), plot.caption
