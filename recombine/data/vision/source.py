"""What a task hands to ``VisionData``: classes, licence, and per split the pictures and their labels."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recombine.data.sampling import stratified
from recombine.errors import UsageError, first_line

SIZES = {"train": 800, "val": 200, "test": 1000}  # VTAB-1K's form; test sets may be smaller


@dataclass(frozen=True)
class Lazy:
    """Things made when asked for: ``make(items[i])``; pictures are uint8 (H, W) or (H, W, 3)."""

    make: Callable[[Any], Any]
    items: Sequence

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.make(self.items[index])


@dataclass(frozen=True)
class Source:
    """All pictures of a task, with what a result says of them."""

    classes: list[str]
    licence: str
    splits: dict[str, tuple[Sequence[np.ndarray], np.ndarray]]  # pictures and their int64 labels
    note: str = ""
    differences: tuple[str, ...] = ()  # from what papers print of this data, one line each


@dataclass(frozen=True)
class Part:
    """Encoded pictures and their labels, int64 (N,). An item is a path, or (where it is from, bytes)."""

    items: Sequence[Path] | Sequence[tuple[str, bytes]]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def limited(self, count: int | None) -> Part:
        """At most so many, every class in its share: a listing goes class by class. In their order."""
        few = count is not None and count < len(self)
        return self.take(np.sort(stratified(self.labels, count, 0))) if few else self

    def take(self, rows: np.ndarray) -> Part:
        """The pictures with these indices (k,), in this order."""
        items = self.items
        taken = [items[i] for i in rows] if isinstance(items, list) else Lazy(items.__getitem__, rows)
        return Part(taken, self.labels[rows])


def join(parts: Sequence[Part]) -> Part:
    """The pictures of all parts, one part after the other."""
    labels = np.concatenate([part.labels for part in parts])
    if all(isinstance(part.items, list) for part in parts):
        return Part([item for part in parts for item in part.items], labels)
    where = [(part.items, i) for part in parts for i in range(len(part))]
    return Part(Lazy(lambda at: at[0][at[1]], where), labels)


def decode(item: Path | tuple[str, bytes], upright: bool = False) -> np.ndarray:
    """uint8 (H, W, 3).

    Args:
        upright: turn it as its EXIF says that it was taken.

    Raises:
        UsageError: Pillow cannot read it.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    where, file = (item, item) if isinstance(item, Path) else (item[0], io.BytesIO(item[1]))
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # `convert` would cut at 255
            if image.mode in ("I", "F"):
                raise ValueError(
                    f"its greys (Pillow's mode {image.mode}) have no known range; save it with 8 or 16 bits"
                )
            return np.asarray((ImageOps.exif_transpose(image) if upright else image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises on bad files
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UsageError(f"cannot read the picture {where}: {reason}; replace or remove it") from error


def decoded(parts: Mapping[str, Part], limit: int | None) -> dict[str, tuple[Lazy, np.ndarray]]:
    """The splits of a `Source`, decoded when they are read; of each at most so many, as `Part.limited` chooses them."""
    parts = {split: parts[split].limited(limit) for split in SIZES}
    return {split: (Lazy(decode, part.items), part.labels) for split, part in parts.items()}
