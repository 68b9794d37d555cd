"""Sentence classification and regression as a LightningDataModule over token ids.

A subclass says where sentences come from (``source``) and what identifies them (``identity``). They are tokenised once
per tokenizer and length into one file under ``cache_dir()/texts``. A batch is padded to its longest sentence; training
batches are of similar lengths (``Buckets``), so that little of a batch is padding:

    {"input_ids" (B, T), "attention_mask" (B, T), "labels" (B,)}, and "token_type_ids" (B, T) for pairs of sentences,
    and "part" (B,) of a test set that has two parts: 0, or 1 for a row of the source's ``test_more``

``select`` says what chooses the epoch:
    val   a validation set of the task's own, or a seeded tenth of train, held out; the test set is read once
    test  the test set itself, as papers on GLUE do whose test labels are hidden: the best epoch on the reported set
    last  nothing: all of train, and the last epoch
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler
from torchmetrics import MetricCollection

from recombine.data.base import SPLITS, CachedModule, TokenModule, log_once
from recombine.data.metrics import collection
from recombine.data.sampling import shuffled, stratified
from recombine.data.text.tokenised import Buckets, Row, Texts, description, encode, fingerprint, join, write
from recombine.errors import UsageError
from recombine.runtime.assets import cache_dir
from recombine.runtime.kinds import BatchSize, Count, Seed, Tokens, Word, Workers

HELD_OUT = 0.1  # of train, where a task has no validation set of its own


@dataclass(frozen=True)
class TextSource:
    """All sentences of a task, with what a result says of them.

    ``splits`` are train, test and perhaps val, and perhaps test_more, a second part of the test set. Each is its rows
    and their labels: int64 (N,), or float64 (N,) for regression.
    """

    licence: str
    splits: dict[str, tuple[list[Row], np.ndarray]]
    note: str = ""
    differences: tuple[str, ...] = ()  # from what papers print of this data, one line each


class TextData(CachedModule, TokenModule):
    """Sentences, or pairs of them, and a class or a number for each.

    A subclass sets `name`, `group`, `classes` (None: a number is predicted) and `scores`, names of METRICS. The first
    of these chooses the epoch and is printed first. It writes `source` and `identity`.

    Args:
        task: of the data set.
        batch_size: of the run, over all its devices.
        max_length: tokens, from 8; longer rows are cut.
        bucket: batches that are sorted by length together; 1: no sorting.
        select: "val", "test" or "last".
        seed: of the order of the training data, and of what is held out of it.
        num_workers: processes that load batches.
        limit: rows a split; None: all.

    Raises:
        UsageError: a value that is out of range.
    """

    classes: list[str] | None
    scores: tuple[str, ...]

    def __init__(
        self,
        *,
        task: Word,
        batch_size: BatchSize = 32,
        max_length: Tokens = 128,
        bucket: Count = 32,
        select: Literal["val", "test", "last"] = "val",
        seed: Seed = 0,
        num_workers: Workers = 0,
        limit: Count | None = None,
    ):
        super().__init__()
        self.task, self.batch_size, self.max_length, self.bucket = task, batch_size, max_length, bucket
        self.select, self.seed, self.num_workers, self.limit = select, seed, num_workers, limit

    def source(self) -> TextSource:
        """Where the sentences of every split come from."""
        raise NotImplementedError

    @property
    def objective(self) -> str:
        return "classification" if self.classes else "regression"

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier: 1 for regression."""
        return len(self.classes) if self.classes else 1

    @property
    def metric(self) -> str:
        return self.scores[0]

    def metrics(self) -> MetricCollection:
        return collection(self.scores, self.num_classes)

    @property
    def path(self) -> Path:
        self.require_tokenizer()
        if self.max_length > (longest := self.tokenizer.model_max_length):
            raise UsageError(f"data.max_length={self.max_length}: this model reads at most {longest} tokens")
        parts = ["1", self.identity(), str(self.limit), str(self.max_length), fingerprint(self.tokenizer)]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        return cache_dir() / "texts" / f"{self.task}-{key}.safetensors"

    def cached(self) -> dict | None:
        return description(self.path)

    def build_cache(self) -> None:
        source = self.source()
        meta = {"licence": source.licence, "note": source.note, "differences": list(source.differences), "splits": {}}
        tensors: dict[str, np.ndarray] = {}
        seen: dict[str, list[bytes]] = {}
        for split, (rows, labels) in source.splits.items():
            self._check_labels(split, labels)
            rows, labels = rows[: self.limit], labels[: self.limit]
            seen[split] = [hashlib.sha256("\x1f".join(row).encode()).digest() for row in rows]
            digest = hashlib.sha256(b"".join(seen[split]) + labels.astype("<f8").tobytes()).hexdigest()
            encoded, cut = encode(self.tokenizer, rows, self.max_length)
            tensors |= {f"{split}.{key}": value for key, value in (encoded | {"labels": labels}).items()}
            meta["splits"][split] = {"size": len(rows), "sha256": digest, "cut": cut}
        if self.limit is None:
            self.check({split: part["sha256"] for split, part in meta["splits"].items()})
        tests = seen["test"] + seen.get("test_more", [])
        places = {digest: i for i, digest in reversed(list(enumerate(tests)))}
        shared = [(i, places[d]) for i, d in enumerate(seen["train"] + seen.get("val", [])) if d in places]
        meta["shared_train_test"], meta["first_shared"] = len(shared), shared[0] if shared else None
        write(self.path, tensors, meta)

    def _check_labels(self, split: str, labels: np.ndarray) -> None:
        what = f"{self.name} {self.task}: {split}"
        if not len(labels):
            raise UsageError(f"{what} is empty: restore it")
        if self.classes is None:
            return
        if len(outside := np.flatnonzero((labels < 0) | (labels >= self.num_classes))):
            row, top = outside[0], self.num_classes - 1
            raise UsageError(f"{what}, row {row}: label {labels[row]} is out of range: must be from 0 to {top}")
        if split == "train" and len(missing := np.setdiff1d(np.arange(self.num_classes), labels)):
            raise UsageError(f"{what} has no {self.classes[missing[0]]!r}: every class must be there, restore the file")

    def setup(self, stage: str | None = None) -> None:
        """Reads the cached file, and says what differs from the papers and what train and test share."""
        meta = self.cached()
        if meta is None:
            raise UsageError(f"no sentences for {self.task} in {self.path}: call prepare_data() first")
        self.meta, pad = meta, self.tokenizer.pad_token_id
        tensors = load_file(self.path)
        splits = {
            split: Texts(*(tensors.get(f"{split}.{key}") for key in ("ids", "ends", "types", "labels")), pad)
            for split in meta["splits"]
        }
        self.train, self.test = splits["train"], splits["test"]
        if "test_more" in splits:
            sizes = len(self.test), len(splits["test_more"])
            self.test = join(self.test, splits["test_more"])
            self.test.parts = np.repeat([0, 1], sizes)
        if self.select == "val":
            if "val" in splits:
                self.val = splits["val"]
            else:
                held = np.zeros(len(self.train), bool)
                held[self._held_out(self.train.labels)] = True
                self.train, self.val = self.train.take(np.flatnonzero(~held)), self.train.take(np.flatnonzero(held))
        else:
            self.train = join(self.train, splits["val"]) if "val" in splits else self.train
            self.val = self.test if self.select == "test" else None
        for line in meta["differences"]:
            log_once(f"{self.name} {self.task}: {line}")
        if shared := meta["shared_train_test"]:
            train, test = meta["first_shared"]
            where = f"the first is row {train} of train and {test} of test"
            log_once(f"{self.name} {self.task}: {shared} rows of train are in test too, {where}")

    def _held_out(self, labels: np.ndarray) -> np.ndarray:
        """The rows of train, by their labels (N,), that become val."""
        count = max(1, round(HELD_OUT * len(labels)))
        return stratified(labels, count, self.seed) if self.classes else shuffled(len(labels), self.seed)[:count]

    @property
    def info(self) -> dict[str, Any]:
        sizes = {split: len(getattr(self, split) or ()) for split in SPLITS}
        held = "" if "val" in self.meta["splits"] else ", a seeded tenth of train"
        how = {
            "val": f"choose the epoch on val {sizes['val']}{held}, test once",
            "test": "choose the epoch on test itself",
            "last": "last epoch, test once",
        }
        return {
            "name": self.name,
            "task": self.task,
            "group": self.group,
            "objective": self.objective,
            "metric": self.metric,
            "classes": self.classes,
            "licence": self.meta["licence"],
            "note": self.meta["note"],
            "differences": self.meta["differences"],
            "sizes": sizes,
            "sha256": {split: part["sha256"] for split, part in self.meta["splits"].items()},
            "shared_train_test": self.meta["shared_train_test"],
            "first_shared": self.meta["first_shared"],
            "select": self.select,
            "protocol": f"train {sizes['train']}, {how[self.select]}",
            "max_length": self.max_length,
            "cut_to_max_length": {split: part["cut"] for split, part in self.meta["splits"].items()},
            "tokenizer": fingerprint(self.tokenizer)[:16],
            "seed": self.seed,
            "limit": self.limit,
        }

    # Batches

    def shuffled_batches(self, split: Texts) -> Buckets:
        generator = torch.Generator()
        sampler = RandomSampler(split, generator=generator)
        return Buckets(sampler, self.batch_size, False, split.lengths, self.bucket, generator)

    def ordered_batches(self, split: Texts) -> Buckets:
        return Buckets(SequentialSampler(split), self.batch_size, False, split.lengths, len(split))  # all by length

    def sample(self) -> dict[str, Tensor]:
        """A batch of one, of the training data's median length."""
        return self.train.__getitems__([int(np.argsort(self.train.lengths, kind="stable")[len(self.train) // 2])])
