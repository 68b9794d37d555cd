"""Image classification as a LightningDataModule over memory-mapped uint8.

A subclass says where pictures come from (``source``) and what identifies them (``identity``). They are decoded and
resized once (Pillow, bicubic, to a square as VTAB does) into one file a task and size under ``cache_dir()/images``,
and mapped from then on, so an epoch costs no decoding. Batches leave the loaders as uint8 (B, 3, H, W) and are
normalised, and augmented where that is asked for, on the device.

Any number of processes may ask for the same pictures at once: one builds, the others wait for it, and a builder that
dies leaves a temporary file that the next one removes.

Protocol: train on 800, choose on the 200 of val, look at test once. With ``select="last"`` there is no validation
(``val`` is None) and the last epoch counts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recombine.data.base import SPLITS, CachedModule, announce, whole
from recombine.data.vision import augment as augmentation
from recombine.errors import UsageError
from recombine.runtime.assets import cache_dir, writing

STALE = 600  # seconds after which a temporary file that nobody writes to is a dead builder's


class Images(Dataset):
    """A split: uint8 (N, 3, H, W) mapped from row ``start`` of a cached file, and labels int64 (N,)."""

    def __init__(self, path: Path, start: int, labels: np.ndarray):
        self.path, self.start, self.labels = path, start, labels
        self.images = np.load(path, mmap_mode="r")[start : start + len(labels)]

    def __reduce__(self):
        return Images, (self.path, self.start, self.labels)  # a loader's worker maps the file anew

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(self.images[indices])  # fancy indexing copies out of the map: (B, 3, H, W)
        return images, torch.from_numpy(self.labels[indices])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


class VisionData(CachedModule):
    name: str
    group: str
    suite: ClassVar[dict[str, str]] = {}  # task -> group: what data.task=all runs
    select = "val"  # what chooses the weights: val, or last for the last epoch
    joined = False  # train is train and val together
    native = False  # the very classes that classifiers of pretrained backbones tell apart, in their order

    def __init__(
        self,
        *,
        task: str | None,
        image_size: int | None = None,
        batch_size: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        num_workers: int = 0,
        limit: int | None = None,
        augment: str = "none",
    ):
        """``image_size``, ``mean`` and ``std`` belong to the model and may be set later; ``limit`` cuts every split."""
        super().__init__()
        whole(1, image_size=image_size, batch_size=batch_size, limit=limit)
        whole(0, num_workers=num_workers)
        if augment not in augmentation.KINDS:
            raise UsageError(f"data.augment={augment}: must be one of {', '.join(augmentation.KINDS)}")
        self.task, self.image_size, self.batch_size, self.augment = task, image_size, batch_size, augment
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.seed, self.num_workers, self.limit = seed, num_workers, limit

    @property
    def path(self) -> Path:
        if self.image_size is None:
            raise UsageError(
                f"image_size is not set for data {self.name!r}: set data.image_size to the model's, e.g. 98"
            )
        key = hashlib.sha256(f"2 {self.identity()} {self.limit} {self.image_size} bicubic".encode()).hexdigest()[:16]
        return cache_dir() / "images" / f"{self.task or self.name}-{self.image_size}-{key}.npy"

    def _meta(self) -> dict | None:
        """The description of a whole cached file, or None when it is missing, cut short or damaged."""
        try:
            meta = json.loads(self.path.with_suffix(".json").read_text())
            return meta if self.path.stat().st_size == meta["bytes"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _build(self) -> None:
        source, path = self.source(), self.path
        splits = {s: (images, labels[: self.limit]) for s, (images, labels) in source.splits.items()}
        total = sum(len(labels) for _, labels in splits.values())
        shape = (total, 3, self.image_size, self.image_size)
        meta = {"classes": source.classes, "licence": source.licence, "note": source.note, "splits": {}}
        meta["differences"] = list(source.differences)
        digests: dict[str, list[bytes]] = {}
        with writing(path.parent):
            sweep(path.parent)
            room(path.parent, int(np.prod(shape, dtype=np.int64)))
            scratch = path.with_name(f"{path.name}.{uuid4().hex}")
            try:
                with scratch.open("wb") as file, self._progress(total) as bar:
                    # Written, not mapped: a full disk is then an OSError and not a bus error.
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    for split, (images, labels) in splits.items():
                        digests[split] = []
                        for digest, pixels in _decode(images, len(labels), self.image_size):
                            digests[split].append(digest)
                            file.write(pixels)
                            bar.update()
                        digest = hashlib.sha256(b"".join(digests[split]) + labels.astype("<i8").tobytes()).hexdigest()
                        meta["splits"][split] = {"size": len(labels), "sha256": digest, "labels": labels.tolist()}
                    meta["bytes"] = file.tell()
                if self.limit is None:
                    self.check({split: part["sha256"] for split, part in meta["splits"].items()})
                meta["shared"] = {split: _shared(digests[split], digests["test"]) for split in ("train", "val")}
                os.replace(scratch, path)  # pictures first: the description says that they are whole
                scratch.write_text(json.dumps(meta))
                os.replace(scratch, path.with_suffix(".json"))
            finally:
                scratch.unlink(missing_ok=True)

    def _progress(self, total: int):
        from tqdm import tqdm

        every = 0.1 if sys.stderr.isatty() else 10  # a log file gets few lines
        return tqdm(
            total=total, desc=f"{self.task or self.name} at {self.image_size} px", unit="img", mininterval=every
        )

    def setup(self, stage: str | None = None) -> None:
        meta = self._meta()
        if meta is None:
            raise UsageError(f"no pictures for {self.task or self.name} in {self.path}: call prepare_data() first")
        self.meta, self.classes, self.num_classes = meta, meta["classes"], len(meta["classes"])
        path, start = self.path, 0
        for split in SPLITS:
            part = meta["splits"][split]
            setattr(self, split, Images(path, start, np.array(part["labels"], np.int64)))
            start += part["size"]
        if self.joined:  # they are neighbours in the file
            self.train = Images(path, 0, np.concatenate([self.train.labels, self.val.labels]))
        if self.select == "last":
            self.val = None
        title = self.task or self.name
        for line in meta["differences"]:
            announce(f"{title}: {line}")
        if shared := self.shared:
            train, test = self.first_shared
            line = f"{shared} pictures of train are in test too, the first is train {train} and test {test}"
            warnings.warn(f"{title}: {line}", stacklevel=2)

    @property
    def shared(self) -> int:
        """Pictures that train, as it is used, has in common with test, by the hash of what was decoded."""
        return sum(self.meta["shared"][split][0] for split in ("train", "val")[: 1 + self.joined])

    @property
    def first_shared(self) -> tuple[int, int] | None:
        """Where the first of them lies in train and in test."""
        for split in ("train", "val")[: 1 + self.joined]:
            if self.meta["shared"][split][0]:
                _, mine, theirs = self.meta["shared"][split]
                return mine + (self.meta["splits"]["train"]["size"] if split == "val" else 0), theirs
        return None

    @property
    def info(self) -> dict[str, Any]:
        """What a result must record about its data."""
        sizes = {split: len(getattr(self, split) or ()) for split in SPLITS}
        chosen = "last epoch" if self.val is None else f"choose on val {sizes['val']}"
        return {
            "name": self.name,
            "task": self.task,
            "group": self.group,
            "classes": self.num_classes,
            "licence": self.meta["licence"],
            "note": self.meta["note"],
            "differences": self.meta["differences"],
            "sizes": sizes,
            "sha256": {split: part["sha256"] for split, part in self.meta["splits"].items()},
            "shared_train_test": self.shared,
            "first_shared": self.first_shared,
            "protocol": f"train {sizes['train']}, {chosen}, test once",
            "image_size": self.image_size,
            "resize": "bicubic to a square",
            "augment": self.augment,
            "mean": self.mean,
            "std": self.std,
            "seed": self.seed,
            "limit": self.limit,
        }

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32, on the images' device."""
        for key, value in (("mean", self.mean), ("std", self.std)):
            if value is None or len(value) != 3:
                raise UsageError(
                    f"data.{key}={value} is not one number a channel: set the model's, e.g. [0.5, 0.5, 0.5]"
                )
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) * 255 for v in (self.mean, self.std))
        return (images.float() - mean) / std

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if images.dtype != torch.uint8:
            return batch
        draws = self._draws() if self.augment != "none" and self.trainer and self.trainer.training else None
        if draws and self.augment == "flip":
            images = augmentation.flip(images, draws)
        images = self.normalise(images)
        return (augmentation.crop(images, draws) if draws and self.augment == "crop" else images), labels

    def _draws(self) -> torch.Generator:
        """Starts anew at every step of every rank, so that its draws depend on nothing before it."""
        state = (self.seed, self.trainer.global_step, self.trainer.global_rank)
        if getattr(self, "_state", None) != state:
            self._state = state
            self._generator = torch.Generator().manual_seed(int(np.random.SeedSequence(state).generate_state(1)[0]))
        return self._generator


def sweep(folder: Path) -> None:
    """Removes what killed builders left."""
    for path in folder.glob("*.npy.*"):
        with suppress(OSError):  # another sweeper was first
            if time.time() - path.lstat().st_mtime > STALE:
                path.unlink()


def room(folder: Path, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def _shared(mine: list[bytes], theirs: list[bytes]) -> tuple[int, int, int] | tuple[int]:
    """(how many different pictures are in both, where the first is in mine, and in theirs)"""
    where = {digest: i for i, digest in reversed(list(enumerate(theirs)))}
    both = [i for i, digest in enumerate(mine) if digest in where]
    return (len({mine[i] for i in both}), both[0], where[mine[both[0]]]) if both else (0,)


def _decode(images: Sequence[np.ndarray], count: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Per picture, in order: sha256 of what was decoded, and the bytes of (3, size, size)."""
    from PIL import Image

    def one(index: int) -> tuple[bytes, bytes]:
        pixels = np.ascontiguousarray(images[index])
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
        picture = Image.fromarray(pixels).convert("RGB")
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        return digest, np.asarray(picture).transpose(2, 0, 1).tobytes()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, count, 128):  # in portions: what is decoded but not written stays small
            yield from pool.map(one, range(start, min(start + 128, count)))
