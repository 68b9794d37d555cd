"""The first screen: the figure that decides, and three findings in words. And the cards of the other studies."""

from collections.abc import Sequence
from pathlib import Path

from recombine.report import page_bars, page_svg
from recombine.report.page_inline import inline, plain
from recombine.report.page_markup import Markup, link, relative, tag
from recombine.report.studies import Study

FINDINGS = 3  # that stand on the first screen


def leading(study: Study, folder: Path) -> Markup:
    """The first screen. study: one with a figure and findings; folder: where the page will lie."""
    items = [tag("li", *inline(line, study.folder, folder)) for line in study.findings[:FINDINGS]]
    more = link(relative(study.folder / "README.md", folder), "How it was measured, and the rest")
    return tag(
        "section",
        tag("h2", study.title, id="lead-title"),
        tag(
            "div",
            figure(study),
            tag("div", tag("ol", *items, class_="findings"), tag("p", more, class_="about")),
            class_="both",
        ),
        id="lead",
        aria_labelledby="lead-title",
    )


def figure(study: Study) -> Markup:
    """A study's picture with its caption: an SVG as it is, a CSV as bars."""
    path, caption = study.picture
    if path.suffix == ".csv":
        bars = page_bars.from_csv(path)
        return tag("figure", page_bars.rows(bars, caption), plain(f"Test accuracy in per cent. {study.intro}"))
    drawn = page_svg.svg(path.read_text(encoding="utf-8"), f"study-{study.name}", caption)
    return tag("figure", tag("div", drawn), plain(caption))


def others(found: Sequence[Study], folder: Path) -> list[Markup]:
    """The other studies that have a picture or findings, folded; nothing where there are none."""
    items = []
    for study in found:
        if not (study.picture or study.findings):
            continue
        lines = [tag("li", *inline(line, study.folder, folder)) for line in study.findings]
        inside = [tag("p", *inline(study.intro, study.folder, folder))]
        inside += [figure(study)] if study.picture else []
        inside += [tag("ul", *lines, class_="notes")] if lines else []
        readme = tag("p", link(relative(study.folder / "README.md", folder), "All of it"), class_="about")
        items.append(tag("details", tag("summary", study.title), *inside, readme))
    title = tag("h2", "Other studies", id="studies-title")
    return [tag("section", title, *items, id="studies", aria_labelledby="studies-title")] if items else []
