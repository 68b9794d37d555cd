"""The HTML that the page is made of. Every string that is not `Markup` is text, and `tag` escapes it."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote


class Markup(str):
    """HTML; every other string is text, which `tag` escapes."""


def tag(name: str, /, *inside: str, **attributes: Any) -> Markup:
    """An element. Text and attributes are escaped; class_ is class, data_value data-value; None is left out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = f"<{name}" + "".join(f' {key}="{escape(str(value))}"' for key, value in given.items()) + ">"
    if name in ("meta", "br"):
        return Markup(opening)
    content = "".join(part if isinstance(part, Markup) else escape(part, quote=False) for part in inside)
    return Markup(
        f"{opening}{content}</{name}>" + ("\n" if name in ("tr", "li", "table", "figure", "section", "nav") else "")
    )


def sheet(name: str, heads: Sequence[Markup], rows: Sequence[Markup], kind: str) -> Markup:
    """A table that scrolls by itself where it is too wide."""
    caption = tag("caption", name, class_="unseen")
    inside = tag("table", caption, tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_=kind)
    return tag("div", inside, class_="sheet", role="region", aria_label=name, tabindex=0)


def command(line: str) -> Markup:
    """A command line; page.js puts a button beside it that copies it."""
    return tag("code", line, class_="command")


def link(address: str, content: str) -> Markup:
    """A link to an address, for example "table.csv"."""
    return tag("a", content, href=address)


def relative(path: Path, folder: Path) -> str:
    """The address of a file, seen from a folder."""
    return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())
