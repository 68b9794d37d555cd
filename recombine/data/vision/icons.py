"""The emoji of four vendors as SVG, out of the packages of Iconify."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

from recombine.runtime.archives import read_many
from recombine.runtime.assets import fetch


def slug(name: str) -> str:
    """A name as Iconify writes it: "Cat with tears of joy" is cat-with-tears-of-joy."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("&", "and").replace("'", "")).strip("-")


class Icons:
    """All drawings of a vendor: noto, twemoji, openmoji or fluent."""

    def __init__(self, vendor: str):
        files = read_many(fetch(f"emoji_{vendor}"), ["package/icons.json", "package/chars.json"])
        self.icons, chars = (json.loads(files[f"package/{name}.json"]) for name in ("icons", "chars"))
        self.points = {re.sub("-?fe0f", "", key.lower()).strip("-"): name for key, name in chars.items()}

    @property
    def names(self) -> list[str]:
        """The slugs of all drawings, in order; no other name of a drawing is among them."""
        return sorted(self.icons["icons"])

    def svg(self, icon: str) -> str | None:
        """The drawing of a slug; None: there is none."""
        aliases = self.icons.get("aliases", {})
        while icon not in self.icons["icons"] and icon in aliases:
            icon = aliases[icon]["parent"]
        if (drawing := self.icons["icons"].get(icon)) is None:
            return None
        left, top, width, height = (
            drawing.get(k, self.icons.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{drawing["body"]}</svg>'
        )


def drawings(vendor: str, emoji: Sequence[str], names: Sequence[str]) -> list[str | None]:
    """The SVG of every emoji, None where the vendor has none: found by code points, else by the slug of its name."""
    of = Icons(vendor)
    return [of.svg(of.points.get(key, slug(name))) for key, name in zip(emoji, names, strict=True)]
