"""Drawings with their names as prompts, out of packages: what a small model learns to draw from.

    emoji        the emoji of three vendors, "grinning cat, noto emoji"
    openclipart  clip art by file name and class, "ice cube, beverage clip art"
    drawings     both

OpenMoji is in none of them: its style is for personalising. Test rows are the emoji and drawings that the offline
benchmark tests on; validation takes a twentieth of the others. Flags and skin tones are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recombine.data.base import exclusive_build, require_known
from recombine.data.prompted.base import Asked, Prompted, PromptedData
from recombine.data.sampling import shuffled
from recombine.data.vision import cache, packaged
from recombine.data.vision.icons import Icons, slug
from recombine.data.vision.source import Lazy, Source
from recombine.errors import UsageError
from recombine.runtime.archives import read_many
from recombine.runtime.assets import ASSETS, cache_dir, fetch
from recombine.runtime.kinds import Word

VENDORS = ("noto", "twemoji", "fluent")  # noto says which emoji
LEFT_OUT = re.compile(r".*(?:skin-tone|flag|regional-indicator|keycap).*")
SHOWN = 8  # prompts that are drawn in a test
VERSION = 1  # of the pictures, their prompts and their split

Rows = list[tuple[str, str | bytes, bool]]  # prompt, drawing, whether it is tested on


def emoji() -> Rows:
    """The emoji of VENDORS."""
    table, _ = packaged.read_table("emoji19.csv")
    tested = {slug(name) for name, test in zip(table["name"], table["test"], strict=True) if test == "1"}
    of = {vendor: Icons(vendor) for vendor in VENDORS}
    names = [name for name in of["noto"].names if not LEFT_OUT.fullmatch(name)]
    found = [(name, vendor, icons.svg(name)) for name in names for vendor, icons in of.items()]
    return [(f"{n.replace('-', ' ')}, {vendor} emoji", svg, n in tested) for n, vendor, svg in found if svg]


def openclipart() -> Rows:
    """Drawings of Debian's openclipart-svg, the flags left out."""
    table, _ = packaged.read_table("openclipart25.csv")
    root = "usr/share/openclipart/svg/"
    files = read_many(fetch("openclipart"), [root + path for path in table["path"]])
    rows = zip(table["path"], table["class"], table["test"], strict=True)
    return [(caption(path, kind), files[root + path], test == "1") for path, kind, test in rows if kind != "flag"]


def caption(path: str, kind: str) -> str:
    """The prompt of a drawing: the first words of its file's name that are no numbers, and its class."""
    words = [word for word in re.split(r"[^a-z]+", Path(path).stem.lower()) if len(word) > 1 and word != "md"]
    return f"{' '.join(words[:3])}, {kind} clip art".lstrip(" ,")


TASKS = {"emoji": (emoji,), "openclipart": (openclipart,), "drawings": (emoji, openclipart)}
LICENCES = {"emoji": [f"emoji_{vendor}" for vendor in VENDORS], "openclipart": ["openclipart"]}


def picture(drawing: str | bytes) -> np.ndarray:
    """uint8 (128, 128, 3)."""
    return packaged.clipart_picture(drawing) if isinstance(drawing, bytes) else packaged.emoji_picture(drawing)


class Captions(PromptedData):
    """A task of TASKS; the other arguments are those of `PromptedData`."""

    name = group = "captions"
    label = "packaged drawings"

    def __init__(self, *, task: Word = "drawings", **kwargs):
        require_known("data.task", "task", task, TASKS)
        super().__init__(task=task, **kwargs)

    @property
    def path(self) -> Path:
        """The cached pictures."""
        part = "" if self.limit is None else f"-{self.limit}"
        return cache_dir() / "images" / f"captions-{self.task}-{self.image_size}{part}-v{VERSION}.npy"

    def source(self) -> Source:
        """Pictures whose classes are their prompts."""
        rows = [row for part in TASKS[self.task] for row in part()]
        prompts = sorted({prompt for prompt, _, _ in rows})
        number = {prompt: i for i, prompt in enumerate(prompts)}
        learnt = [row for row in rows if not row[2]]
        order = shuffled(len(learnt), 3135)
        cut = len(learnt) // 20
        parts = {"train": [learnt[i] for i in sorted(order[cut:])], "val": [learnt[i] for i in sorted(order[:cut])]}
        parts["test"] = [row for row in rows if row[2]]
        names = LICENCES["emoji"] + LICENCES["openclipart"] if self.task == "drawings" else LICENCES[self.task]
        splits = {
            split: (Lazy(picture, [drawing for _, drawing, _ in part]), np.array([number[p] for p, _, _ in part]))
            for split, part in parts.items()
        }
        return Source(prompts, "; ".join(f"{name}: {ASSETS[name].licence}" for name in names), splits)

    def prepare_data(self) -> None:
        """Makes the cached file where there is none; of several processes, one does and the others wait."""
        if cache.description(self.path) is None:
            with exclusive_build(self.path.stem):
                if cache.description(self.path) is None:
                    source = self.source()
                    limits = dict.fromkeys(source.splits, self.limit)
                    cache.build(self.path, source, self.image_size, limits, lambda _: None, f"captions {self.task}")

    def setup(self, stage: str | None = None) -> None:
        """Maps the cached file."""
        self.meta = cache.description(self.path)
        if self.meta is None:
            raise UsageError(f"no pictures for {self.task} in {self.path}: call prepare_data() first")
        self.prompts, start = self.meta["classes"], 0
        tokens = self.tokens(self.prompts)
        for split, part in self.meta["splits"].items():
            labels = np.array(part["labels"], np.int64)
            images = cache.Images(self.path, start, labels)
            setattr(self, split, Prompted(Pixels(images), labels, tokens))
            start += part["size"]

    def asked(self, prompts: Sequence[str] | None) -> list[Asked]:
        """The first prompts of the test set, each with its picture; or those that are given."""
        if prompts is not None:
            return [Asked(prompt, "other") for prompt in prompts]
        rows = range(0, len(self.test), max(1, len(self.test) // SHOWN)) if hasattr(self, "test") else ()
        which = {row: self.prompts[self.test.prompt[row]] for row in rows}
        return [Asked(prompt, "subject", self.test.pixels([row])) for row, prompt in which.items()][:SHOWN]

    @property
    def info(self) -> dict:
        sizes = self.sizes
        return {
            "name": self.name,
            "task": self.task,
            "group": self.group,
            "licence": self.meta["licence"],
            "note": "names of the drawings are their prompts; OpenMoji is left out",
            "sizes": sizes,
            "sha256": {split: part["sha256"] for split, part in self.meta["splits"].items()},
            "protocol": f"train {sizes['train']}, choose on val {sizes['val']}, test once",
            "image_size": self.image_size,
            "resize": "bicubic to a square",
            "seed": self.seed,
            "limit": self.limit,
        }


class Pixels:
    """The pictures of a split by row, without what else its file holds."""

    def __init__(self, images: cache.Images):
        self.images = images

    def __call__(self, rows: list[int]):
        """uint8 (B, 3, S, S)."""
        return self.images.__getitems__(rows)[0]
