"""Image classification as a LightningDataModule over memory-mapped uint8.

A subclass says where pictures come from (``source``) and what identifies them (``identity``). They are decoded and
resized once (Pillow, bicubic, to a square as VTAB does) into one file a task and size under ``cache_dir()/images``,
and mapped from then on, so an epoch costs no decoding. Batches leave the loaders as uint8 (B, 3, S, S) and are
normalised, and augmented where that is asked for, on the device.

Any number of processes may ask for the same pictures at once: one builds the file, the others wait for it.

Protocol: train on 800, choose on the 200 of val, look at test once. With ``select="last"`` there is no validation
(``val`` is None) and the last epoch counts.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from recombine.data.base import SPLITS, CachedModule, log_once
from recombine.data.vision import augment as augmentation
from recombine.data.vision import cache
from recombine.data.vision.source import Source
from recombine.errors import UsageError
from recombine.runtime.assets import cache_dir
from recombine.runtime.kinds import BatchSize, Colours, Count, Deviations, Pixels, Seed, Word, Workers


class VisionData(CachedModule):
    """Pictures and their classes. A subclass sets `name` and `group` and writes `source` and `identity`.

    Args:
        task: of the data set; None where it has only one.
        image_size: pixels of a side, S; None: the model's.
        batch_size: of the run, over all its devices.
        mean, std: one number a channel, of pixels in [0, 1]; None: the model's.
        seed: of the order of the training data, and of augmentation.
        num_workers: processes that load batches.
        limit: pictures a split; None: all.
        augment: "none", "flip" or "crop", of the training batches.

    Raises:
        UsageError: a value that is out of range.
    """

    select = "val"  # what chooses the weights: val, or last for the last epoch
    merge_train_val = False  # train is train and val together
    _drawn_at = None  # the step that `_draws` has begun

    def __init__(
        self,
        *,
        task: Word | None,
        image_size: Pixels | None = None,
        batch_size: BatchSize = 32,
        mean: Colours | None = None,
        std: Deviations | None = None,
        seed: Seed = 0,
        num_workers: Workers = 0,
        limit: Count | None = None,
        augment: Literal["none", "flip", "crop"] = "none",
    ):
        super().__init__()
        self.task, self.image_size, self.batch_size, self.augment = task, image_size, batch_size, augment
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.seed, self.num_workers, self.limit = seed, num_workers, limit

    def source(self) -> Source:
        """Where the pictures of every split come from."""
        raise NotImplementedError

    def attach_model(self, source: Mapping, objective: str, tokenizer: Callable[[], Any] | None) -> None:
        if tokenizer is not None:
            other = {"lm": "text", "denoising": "dreambooth"}.get(objective, "sentences")
            reads = "draws" if objective == "denoising" else "reads text"
            raise UsageError(f"data={self.name} is pictures, model {source['name']} {reads}: take data={other}")
        self.image_size = self.image_size or source["image_size"]
        self.mean, self.std = self.mean or source["mean"], self.std or source["std"]

    @property
    def limits(self) -> dict[str, int | None]:
        """Most pictures by split; None: all."""
        return dict.fromkeys(SPLITS, self.limit)

    @property
    def path(self) -> Path:
        if self.image_size is None:
            raise UsageError(
                f"image_size is not set for data {self.name!r}: set data.image_size to the model's, e.g. 98"
            )
        key = hashlib.sha256(f"2 {self.identity()} {self.limit} {self.image_size} bicubic".encode()).hexdigest()[:16]
        return cache_dir() / "images" / f"{self.task or self.name}-{self.image_size}-{key}.npy"

    def cached(self) -> dict | None:
        return cache.description(self.path)

    def build_cache(self) -> None:
        cache.build(self.path, self.source(), self.image_size, self.limits, self.check, self.task or self.name)

    def setup(self, stage: str | None = None) -> None:
        """Maps the cached file, and says what differs from the papers and what train and test share."""
        meta = self.cached()
        if meta is None:
            raise UsageError(f"no pictures for {self.task or self.name} in {self.path}: call prepare_data() first")
        self.meta, self.classes, self.num_classes = meta, meta["classes"], len(meta["classes"])
        path, start = self.path, 0
        for split in SPLITS:
            part = meta["splits"][split]
            setattr(self, split, cache.Images(path, start, np.array(part["labels"], np.int64)))
            start += part["size"]
        if self.merge_train_val:  # they are neighbours in the file
            self.train = cache.Images(path, 0, np.concatenate([self.train.labels, self.val.labels]))
        if self.select == "last":
            self.val = None
        what = self.task or self.name
        for line in meta["differences"]:
            log_once(f"{what}: {line}")
        if shared := self.shared:
            train, test = self.first_shared
            line = f"{shared} pictures of train are in test too, the first is train {train} and test {test}"
            warnings.warn(f"{what}: {line}", stacklevel=2)

    @property
    def shared(self) -> int:
        """Pictures that train, as it is used, has in common with test, by the hash of what was decoded."""
        return sum(self.meta["shared"][split][0] for split in ("train", "val")[: 1 + self.merge_train_val])

    @property
    def first_shared(self) -> tuple[int, int] | None:
        """Where the first of them lies in train and in test."""
        for split in ("train", "val")[: 1 + self.merge_train_val]:
            if self.meta["shared"][split][0]:
                _, mine, theirs = self.meta["shared"][split]
                return mine + (self.meta["splits"]["train"]["size"] if split == "val" else 0), theirs
        return None

    @property
    def info(self) -> dict[str, Any]:
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
        """uint8 (B, 3, S, S) -> float32 of that shape, on the images' device.

        Raises:
            UsageError: `mean` or `std` is not set, or is not one number a channel.
        """
        for key, value in (("mean", self.mean), ("std", self.std)):
            if value is None or len(value) != 3:
                raise UsageError(
                    f"data.{key}={value} is not one number a channel: set the model's, e.g. [0.5, 0.5, 0.5]"
                )
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) * 255 for v in (self.mean, self.std))
        return (images.float() - mean) / std

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Normalises a batch on its device, and augments it while Lightning trains. Floats pass as they are."""
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
        if self._drawn_at != state:
            self._drawn_at = state
            self._generator = torch.Generator().manual_seed(int(np.random.SeedSequence(state).generate_state(1)[0]))
        return self._generator
