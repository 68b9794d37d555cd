"""A line of Markdown as HTML: bold, code, links to files that there are. All else is text."""

import re
from pathlib import Path

from recombine.report.page_markup import Markup, link, relative, tag

TOKEN = re.compile(r"\*\*(?P<bold>[^*]+)\*\*|`(?P<code>[^`]+)`|\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def inline(line: str, base: Path, folder: Path) -> list[str]:
    """The parts of a line, as `tag` takes them.

    Args:
        base: the folder of the file that the line stands in.
        folder: where the page will lie.
    """
    parts, at = [], 0
    for found in TOKEN.finditer(line):
        parts.append(line[at : found.start()])
        at = found.end()
        if found["bold"]:
            parts.append(tag("b", found["bold"]))
        elif found["code"]:
            parts.append(tag("code", found["code"]))
        elif (path := base / found["target"].split("#")[0]).is_file():
            parts.append(link(relative(path, folder), found["text"]))
        else:
            parts.append(found["text"])
    return [*parts, line[at:]]


def spoken(line: str) -> str:
    """A line without its marks, its first letter large."""
    text = TOKEN.sub(lambda found: found["bold"] or found["code"] or found["text"], line)
    return text[:1].upper() + text[1:]


def plain(line: str) -> Markup:
    """A sentence as a caption."""
    return tag("figcaption", spoken(line))
