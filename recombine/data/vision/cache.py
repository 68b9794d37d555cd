"""The cached pictures of a task: one .npy file, uint8 (N, 3, S, S), and a .json beside it that describes it.

The splits follow each other in the file: train, val, test. The description is written last, so pictures without one
are not whole. A builder that dies leaves a temporary file, which the next one removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recombine.data.base import SPLITS
from recombine.data.vision.source import Source
from recombine.runtime import progress
from recombine.runtime.assets import writing

STALE = 600  # seconds after which a temporary file that nobody writes to is a dead builder's


class Images(Dataset):
    """A split: uint8 (N, 3, S, S) mapped from row ``start`` of a cached file, and labels int64 (N,)."""

    def __init__(self, path: Path, start: int, labels: np.ndarray):
        self.path, self.start, self.labels = path, start, labels
        self.images = np.load(path, mmap_mode="r")[start : start + len(labels)]

    def __reduce__(self):
        return Images, (self.path, self.start, self.labels)  # a loader's worker maps the file anew

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch: images uint8 (B, 3, S, S) and labels int64 (B,)."""
        images = torch.from_numpy(self.images[indices])  # fancy indexing copies out of the map: (B, 3, S, S)
        return images, torch.from_numpy(self.labels[indices])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


def description(path: Path) -> dict | None:
    """What stands beside a whole cached file, or None when either is missing, cut short or damaged."""
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            whole = file.tell() + math.prod(shape) == path.stat().st_size == meta["bytes"]
        parts = meta["splits"]
        rows = sum(part["size"] for part in parts.values() if part["size"] == len(part["labels"]))
        known = [*meta["classes"], *meta["differences"], meta["licence"], meta["note"]]
        known += [*meta["shared"]["train"], *meta["shared"]["val"], *(parts[split]["sha256"] for split in SPLITS)]
        return meta if whole and dtype == np.uint8 and len(shape) == 4 and known and rows == shape[0] else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def build(
    path: Path,
    source: Source,
    size: int,
    limits: Mapping[str, int | None],
    check: Callable[[dict[str, str]], None],
    title: str,
) -> None:
    """Decodes, resizes and writes all pictures of a source.

    Args:
        path: the .npy file.
        size: pixels of a side, S.
        limits: most pictures by split; None: all.
        check: sees the sha256 of every split that has no limit, and may refuse.
        title: of the progress bar.

    Raises:
        OSError: the disk is too small.
    """
    splits = {split: (images, labels[: limits[split]]) for split, (images, labels) in source.splits.items()}
    shape = (sum(len(labels) for _, labels in splits.values()), 3, size, size)
    meta = {"classes": source.classes, "licence": source.licence, "note": source.note, "splits": {}}
    meta["differences"] = list(source.differences)
    with writing(path.parent):
        remove_stale(path.parent)
        require_disk_space(path.parent, int(np.prod(shape, dtype=np.int64)))
        scratch = path.with_name(f"{path.name}.{uuid4().hex}")
        try:
            digests = _write(scratch, splits, shape, meta, title)
            check({split: part["sha256"] for split, part in meta["splits"].items() if limits[split] is None})
            meta["shared"] = {split: _shared(digests[split], digests["test"]) for split in ("train", "val")}
            os.replace(scratch, path)  # pictures first: the description says that they are whole
            scratch.write_text(json.dumps(meta))
            os.replace(scratch, path.with_suffix(".json"))
        finally:
            scratch.unlink(missing_ok=True)


def _write(path: Path, splits: dict, shape: tuple[int, ...], meta: dict, title: str) -> dict[str, list[bytes]]:
    """Writes the pictures, completes ``meta`` and returns the sha256 of every picture as it was decoded."""
    digests: dict[str, list[bytes]] = {split: [] for split in splits}
    # Written, not mapped: a full disk is then an OSError and not a bus error.
    with path.open("wb") as file, progress.bar(f"{title} at {shape[-1]} px", shape[0], "pictures") as bar:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for split, (images, labels) in splits.items():
            for picture, pixels in _decoded(images, len(labels), shape[-1]):
                digests[split].append(picture)
                file.write(pixels)
                bar.update()
            digest = hashlib.sha256(b"".join(digests[split]) + labels.astype("<i8").tobytes()).hexdigest()
            meta["splits"][split] = {"size": len(labels), "sha256": digest, "labels": labels.tolist()}
        meta["bytes"] = file.tell()
    return digests


def remove_stale(folder: Path) -> None:
    """Removes what killed builders left."""
    for path in folder.glob("*.npy.*"):
        with suppress(OSError):  # another process removed it first
            if time.time() - path.lstat().st_mtime > STALE:
                path.unlink()


def require_disk_space(folder: Path, needed: int) -> None:
    """Refuses with an OSError where fewer than ``needed`` bytes are free."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def _shared(mine: list[bytes], theirs: list[bytes]) -> tuple[int, int, int] | tuple[int]:
    """(how many different pictures are in both, where the first is in mine, and in theirs)"""
    where = {digest: i for i, digest in reversed(list(enumerate(theirs)))}
    both = [i for i, digest in enumerate(mine) if digest in where]
    return (len({mine[i] for i in both}), both[0], where[mine[both[0]]]) if both else (0,)


def _decoded(images: Sequence[np.ndarray], count: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Of the first ``count`` pictures, in order: sha256 of what was decoded, and the bytes of (3, size, size)."""
    from PIL import Image

    def resized(index: int) -> tuple[bytes, bytes]:
        pixels = np.ascontiguousarray(images[index])
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
        picture = Image.fromarray(pixels).convert("RGB")
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        return digest, np.asarray(picture).transpose(2, 0, 1).tobytes()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, count, 128):  # in portions: what is decoded but not written stays small
            yield from pool.map(resized, range(start, min(start + 128, count)))
