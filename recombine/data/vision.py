"""Image classification as a LightningDataModule over memory-mapped uint8.

A subclass says where pictures come from (``source``) and what identifies them (``identity``). They are decoded and
resized once (Pillow, bicubic, to a square as VTAB does) into one file a task and size under ``cache_dir()/images``,
and mapped from then on, so an epoch costs no decoding. Batches leave the loaders as uint8 (B, 3, H, W) and are
normalised on the device.

Protocol: train on 800, choose on the 200 of val, look at test once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recombine.assets import cache_dir, writing
from recombine.data.source import Source
from recombine.errors import UsageError

SPLITS = ("train", "val", "test")


class Images(Dataset):
    """A split: uint8 (N, H, W, 3) out of the map, int64 (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(self.images[indices])  # fancy indexing copies out of the map: (B, H, W, 3)
        return images.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(self.labels[indices])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


def _batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch  # __getitems__ made it one already


class VisionData(lightning.LightningDataModule):
    name: str
    group: str

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
    ):
        """``image_size``, ``mean`` and ``std`` belong to the model and may be set later; ``limit`` cuts every split."""
        super().__init__()
        for key, value, least in (
            ("image_size", image_size, 1), ("batch_size", batch_size, 1), ("limit", limit, 1),
            ("num_workers", num_workers, 0),
        ):  # fmt: skip
            if value is not None and (not isinstance(value, int) or value < least):
                raise UsageError(f"{key}={value!r} is no whole number from {least}: give one")
        self.task, self.image_size, self.batch_size = task, image_size, batch_size
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.seed, self.num_workers, self.limit = seed, num_workers, limit

    # What a subclass writes

    def source(self) -> Source:
        raise NotImplementedError

    def identity(self) -> str:
        """Changes when the pictures, their labels or their split change; must be cheap."""
        raise NotImplementedError

    def check(self, digests: dict[str, str]) -> None:
        """Sees the sha256 of every whole split before anything is cached."""

    # Cache

    @property
    def path(self) -> Path:
        if self.image_size is None:
            raise UsageError(
                f"image_size is not set for data {self.name!r}: set data.image_size to the model's, e.g. 98"
            )
        key = hashlib.sha256(f"1 {self.identity()} {self.limit} {self.image_size}".encode()).hexdigest()[:16]
        return cache_dir() / "images" / f"{self.task or self.name}-{self.image_size}-{key}.npy"

    def _meta(self) -> dict | None:
        """The description of a whole cached file, or None when it is missing, cut short or damaged."""
        try:
            meta = json.loads(self.path.with_suffix(".json").read_text())
            return meta if self.path.stat().st_size == meta["bytes"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def prepare_data(self) -> None:
        if self._meta() is None:
            self._build()

    def _build(self) -> None:
        source, path = self.source(), self.path
        splits = {s: (images, labels[: self.limit]) for s, (images, labels) in source.splits.items()}
        total = sum(len(labels) for _, labels in splits.values())
        meta = {"classes": source.classes, "licence": source.licence, "note": source.note, "splits": {}}
        seen: dict[str, set[bytes]] = {}
        with writing(path.parent):
            scratch = path.with_name(f"{path.name}.{uuid4().hex}")
            try:
                with scratch.open("wb") as file, self._progress(total) as bar:
                    # Written, not mapped: a full disk is then an OSError and not a bus error.
                    shape = (total, self.image_size, self.image_size, 3)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    for split, (images, labels) in splits.items():
                        digests = []
                        for digest, pixels in _decode(images, len(labels), self.image_size):
                            digests.append(digest)
                            file.write(pixels)
                            bar.update()
                        digest = hashlib.sha256(b"".join(digests) + labels.astype("<i8").tobytes()).hexdigest()
                        meta["splits"][split] = {"size": len(labels), "sha256": digest, "labels": labels.tolist()}
                        seen[split] = set(digests)
                    meta["bytes"] = file.tell()
                if self.limit is None:
                    self.check({split: part["sha256"] for split, part in meta["splits"].items()})
                meta["shared_train_test"] = len(seen["train"] & seen["test"])
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
        images, start = np.load(self.path, mmap_mode="r"), 0
        for split in SPLITS:
            part = meta["splits"][split]
            setattr(self, split, Images(images[start : start + part["size"]], np.array(part["labels"], np.int64)))
            start += part["size"]
        if shared := meta["shared_train_test"]:
            warnings.warn(f"{self.task or self.name}: {shared} pictures of train are in test too", stacklevel=2)

    @property
    def info(self) -> dict[str, Any]:
        """What a result must record about its data."""
        return {
            "name": self.name,
            "task": self.task,
            "group": self.group,
            "classes": self.num_classes,
            "licence": self.meta["licence"],
            "note": self.meta["note"],
            "sizes": {split: part["size"] for split, part in self.meta["splits"].items()},
            "sha256": {split: part["sha256"] for split, part in self.meta["splits"].items()},
            "shared_train_test": self.meta["shared_train_test"],
            "protocol": f"train {len(self.train)}, choose on val {len(self.val)}, test once",
            "image_size": self.image_size,
            "resize": "bicubic to a square, no augmentation",
            "mean": self.mean,
            "std": self.std,
            "seed": self.seed,
            "limit": self.limit,
        }

    # Loaders

    def _loader(self, split: Images, **kwargs) -> DataLoader:
        return DataLoader(
            split,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_batch,
            **kwargs,
        )

    def train_dataloader(self) -> DataLoader:
        """Another order every epoch, the same ones for the same seed."""
        return self._loader(self.train, shuffle=True, generator=torch.Generator().manual_seed(self.seed))

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test)

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
        return (self.normalise(images) if images.dtype == torch.uint8 else images), labels


def _decode(images: Sequence[np.ndarray], count: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Per picture, in order: sha256 of what was decoded, and the bytes of (size, size, 3)."""
    from PIL import Image

    def one(index: int) -> tuple[bytes, bytes]:
        pixels = np.ascontiguousarray(images[index])
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
        picture = Image.fromarray(pixels).convert("RGB")
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        return digest, picture.tobytes()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, count, 128):  # in portions: what is decoded but not written stays small
            yield from pool.map(one, range(start, min(start + 128, count)))
