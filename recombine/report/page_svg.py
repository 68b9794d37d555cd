"""A plot as SVG that can stand in a page beside others: ids of its own, text as text, the page's colours."""

import io
import re
from html import escape
from typing import Any

from recombine.report.page_markup import Markup

THEMED = {  # colours of a plot that are not data -> what page.css calls them
    "#000000": "var(--ink)",
    "#333333": "var(--ink)",
    "#555555": "var(--dim)",
    "#dddddd": "var(--bar)",
    "#e6e6e6": "var(--line)",
    "#ffffff": "var(--paper)",
    "white": "var(--paper)",
}


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
    drawn = re.sub(r' transform="rotate\(-0 [^"]*"|(?<=style=")[^"]*', lambda match: themed(match[0]), drawn)
    drawn = re.sub(r'(?<= (?:d|x|y)=")[^"]*', lambda match: re.sub(r"(\.\d\d)\d+|\s+$", r"\1", match[0]), drawn)
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
