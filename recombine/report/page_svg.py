"""A plot as SVG that can stand in a page beside others: ids of its own, text as text, the page's colours."""

import re
from functools import cache
from html import escape

from recombine.report.page_markup import Markup, tag

THEMED = {  # colours of a plot that are not data -> what page.css calls them
    "#000000": "var(--ink)",
    "#333333": "var(--ink)",
    "#555555": "var(--dim)",
    "#dddddd": "var(--bar)",
    "#e6e6e6": "var(--line)",
    "#ffffff": "var(--paper)",
    "white": "var(--paper)",
}


def svg(text: str, name: str, label: str) -> Markup:
    """A plot's SVG that can stand in a page beside others: ids of its own, the page's colours and font.

    Args:
        text: the file.
        name: no other plot on the page has it.
        label: what a reader who sees no picture hears.
    """
    drawn = text[text.index("<svg") : text.rindex("</svg>") + len("</svg>")]
    drawn = re.sub(
        r"<style.*?</style>|<metadata>.*?</metadata>", "", drawn, flags=re.S
    )  # would hold for the whole page
    drawn = drawn.replace(' id="figure_1"', "")
    drawn = re.sub(r' id="[\w.]+_\d+"', "", drawn)  # axes_1 and its like, in every figure
    ids = dict.fromkeys(re.findall(r' id="([^"]+)"', drawn))
    hashed = "|".join(re.escape(one) for one in ids if one != "halo")
    if hashed:  # clips and markers of two plots may be called the same
        drawn = re.sub(rf'( id="|"#|url\(#)({hashed})(?=[")])', rf"\1{thumb_id(name)}-\2", drawn)
    drawn = drawn.replace(' id="halo"', ' class="halo"')
    drawn = re.sub(r' transform="rotate\(-0 [^"]*"|(?<=style=")[^"]*', lambda match: themed(match[0]), drawn)
    shape = "wide" if viewed(drawn)[0] > 440 else "narrow"  # of several panels, or of one
    return Markup(
        drawn.replace(
            "<svg ", f'<svg id="{thumb_id(name)}" class="{shape}" role="img" aria-label="{escape(label)}" ', 1
        )
    )


def thumb(drawn: Markup, name: str) -> Markup:
    """The same plot small, drawn by reference to the large one, so that it takes no room. For eyes only."""
    width, height = viewed(drawn)
    use = Markup(f'<use href="#{thumb_id(name)}" width="100%" height="100%"/>')
    return tag("svg", use, viewBox=f"0 0 {width:g} {height:g}", class_="thumb", aria_hidden="true")


def thumb_id(name: str) -> str:
    """The id of a plot's picture."""
    return "plot-" + re.sub(r"[^\w-]+", "-", name)


def viewed(drawn: str) -> tuple[float, float]:
    """Width and height of an SVG in its own units."""
    _, _, width, height = re.search(r'viewBox="([^"]*)"', drawn)[1].split()
    return float(width), float(height)


def themed(style: str) -> str:
    """The colours of a style as the page has them; the font is the page's too."""
    style = re.sub(r" font-family: [^;]*;", "", style)
    return re.sub(r"#[0-9a-f]{6}|\bwhite\b", lambda colour: THEMED.get(colour[0]) or legible(colour[0]), style)


@cache
def legible(colour: str) -> str:
    """A colour of data, made lighter for the dark page where it would be lost there: to the luminance 0.18."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    for share in range(0, 100, 5):
        mixed = [c + (1 - c) * share / 100 for c in channels]
        if sum(weight * c**2.2 for weight, c in zip((0.21, 0.72, 0.07), mixed, strict=True)) >= 0.18:
            break
    lighter = "#" + "".join(f"{round(255 * c):02x}" for c in mixed)
    return colour if lighter == colour else f"light-dark({colour}, {lighter})"
