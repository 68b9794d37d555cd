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
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef

from recombine.data.base import CachedModule, announce, whole
from recombine.data.vision.source import shuffled, stratified
from recombine.errors import UsageError
from recombine.runtime.assets import cache_dir, writing

HELD_OUT = 0.1  # of train, where a task has no validation set of its own
SELECT = ("val", "test", "last")
PORTION = 10_000  # sentences tokenised at a time

Row = tuple[str, ...]  # one sentence, or two


@dataclass(frozen=True)
class TextSource:
    """splits: train, test and perhaps val, each rows and their labels (int64, or float64 for regression); and perhaps
    test_more, a second part of the test set."""

    licence: str
    splits: dict[str, tuple[list[Row], np.ndarray]]
    note: str = ""
    differences: tuple[str, ...] = ()  # from what papers print of this data, one line each


class Texts(Dataset):
    """Rows of a tokenised split.

    ids: int32, all sentences one after the other; ends: (N,), where each ends; types: uint8 like ids, or None; parts:
    (N,), of which part of the split a row is, or None.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray, types: np.ndarray | None, labels: np.ndarray, pad: int):
        self.ids, self.types, self.labels, self.pad = ids, types, labels, pad
        self.parts: np.ndarray | None = None
        self.lengths = np.diff(ends, prepend=0)
        self.starts = ends - self.lengths

    def take(self, rows: np.ndarray) -> Texts:
        some = object.__new__(Texts)
        some.__dict__ = self.__dict__ | {key: getattr(self, key)[rows] for key in ("labels", "lengths", "starts")}
        return some

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        lengths = self.lengths[indices]
        keep = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
        at = np.where(keep, self.starts[indices][:, None] + np.arange(lengths.max()), 0)
        batch = {"input_ids": np.where(keep, self.ids[at], self.pad), "attention_mask": keep}
        if self.types is not None:
            batch["token_type_ids"] = np.where(keep, self.types[at], 0)
        if self.parts is not None:
            batch["part"] = self.parts[indices]
        batch = {key: torch.from_numpy(value.astype(np.int64)) for key, value in batch.items()}
        return batch | {"labels": torch.from_numpy(self.labels[indices])}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}


class Buckets(BatchSampler):
    """Batches of similar lengths: the sampler's order in portions of `bucket` batches, each portion sorted by length
    and cut, and its batches shuffled where there is a generator. Every row comes once an epoch."""

    def __init__(self, sampler, batch_size: int, drop_last: bool, lengths: np.ndarray, bucket: int, generator=None):
        super().__init__(sampler, batch_size, drop_last)
        self.lengths, self.bucket, self.generator = lengths, bucket, generator

    def __iter__(self) -> Iterator[list[int]]:
        order, size = iter(self.sampler), self.batch_size
        while portion := list(islice(order, self.bucket * size)):
            portion = [portion[i] for i in np.argsort(self.lengths[portion], kind="stable")]
            batches = [portion[i : i + size] for i in range(0, len(portion), size)]
            mixed = torch.randperm(len(batches), generator=self.generator) if self.generator else range(len(batches))
            yield from (batches[i] for i in mixed if len(batches[i]) == size or not self.drop_last)


class PositiveF1(BinaryF1Score):
    """F1 of class 1 from the logits of two classes."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        super().update(logits.argmax(-1), labels)


class PartAccuracy(Metric):
    """Accuracy on one part of a test set, or the mean over the parts that there are. A set without parts is part 0.

    Args:
        which: the part; None: the mean.
    """

    full_state_update = False

    def __init__(self, which: int | None = None, parts: int = 2):
        super().__init__()
        self.which = which
        self.add_state("right", torch.zeros(parts, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros(parts, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, part: Tensor | None = None) -> None:
        part = torch.zeros_like(labels) if part is None else part  # (B,)
        self.rows += torch.bincount(part, minlength=len(self.rows))
        self.right += torch.bincount(part[logits.argmax(-1) == labels], minlength=len(self.rows))

    def compute(self) -> Tensor:
        """nan of a part without rows."""
        share = self.right / self.rows
        return share[self.rows > 0].mean() if self.which is None else share[self.which]


METRICS = {  # name -> metric of logits (B, classes), or of values (B,), and labels
    "acc": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "acc_m": lambda classes: PartAccuracy(0),
    "acc_mm": lambda classes: PartAccuracy(1),
    "m+mm": lambda classes: PartAccuracy(),
    "balanced_acc": lambda classes: MulticlassAccuracy(classes, average="macro"),
    "mcc": lambda classes: MulticlassMatthewsCorrCoef(classes),
    "f1": lambda classes: PositiveF1(),
    "pearson": lambda classes: PearsonCorrCoef(),
    "spearman": lambda classes: SpearmanCorrCoef(),
}


class TextData(CachedModule):
    """A subclass sets `group`, `classes` (None: a number is predicted) and `scores`, the metrics, the first of which
    chooses the epoch and is printed first."""

    name: str
    group: str
    classes: list[str] | None
    scores: tuple[str, ...]
    suite: ClassVar[dict[str, str]] = {}  # task -> group: what data.task=all runs

    def __init__(
        self,
        *,
        task: str,
        batch_size: int = 32,
        max_length: int = 128,
        bucket: int = 32,
        select: str = "val",
        seed: int = 0,
        num_workers: int = 0,
        limit: int | None = None,
    ):
        """``tokenizer`` belongs to the model and is set before ``prepare_data``; ``limit`` cuts every split."""
        super().__init__()
        whole(1, batch_size=batch_size, bucket=bucket, limit=limit)
        whole(8, max_length=max_length)
        whole(0, num_workers=num_workers)
        if select not in SELECT:
            raise UsageError(f"data.select={select}: must be one of {', '.join(SELECT)}")
        self.task, self.batch_size, self.max_length, self.bucket = task, batch_size, max_length, bucket
        self.select, self.seed, self.num_workers, self.limit = select, seed, num_workers, limit
        self.tokenizer = None

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
        with warnings.catch_warnings(action="ignore"):  # Spearman's keeps all values, as it must
            return MetricCollection({name: METRICS[name](self.num_classes) for name in self.scores})

    @property
    def path(self) -> Path:
        if self.tokenizer is None:
            raise UsageError(
                f"data {self.name!r} has no tokenizer: set module.tokenizer = models.tokenizer(model.recombine_source)"
            )
        if self.max_length > (longest := self.tokenizer.model_max_length):
            raise UsageError(f"data.max_length={self.max_length}: this model reads at most {longest} tokens")
        parts = ["1", self.identity(), str(self.limit), str(self.max_length), fingerprint(self.tokenizer)]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        return cache_dir() / "texts" / f"{self.task}-{key}.safetensors"

    def _meta(self) -> dict | None:
        """The description in a whole cached file, or None when it is missing, cut short or damaged."""
        try:
            with safe_open(self.path, "np") as file:
                return json.loads(file.metadata()["recombine"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def _build(self) -> None:
        source, path = self.source(), self.path
        meta = {"licence": source.licence, "note": source.note, "differences": list(source.differences), "splits": {}}
        tensors, seen = {}, {}
        for split, (rows, labels) in source.splits.items():
            self._check_labels(split, labels)
            rows, labels = rows[: self.limit], labels[: self.limit]
            seen[split] = [hashlib.sha256("\x1f".join(row).encode()).digest() for row in rows]
            whole = hashlib.sha256(b"".join(seen[split]) + labels.astype("<f8").tobytes()).hexdigest()
            encoded, cut = encode(self.tokenizer, rows, self.max_length)
            tensors |= {f"{split}.{key}": value for key, value in (encoded | {"labels": labels}).items()}
            meta["splits"][split] = {"size": len(rows), "sha256": whole, "cut": cut}
        if self.limit is None:
            self.check({split: part["sha256"] for split, part in meta["splits"].items()})
        tests = seen["test"] + seen.get("test_more", [])
        places = {digest: i for i, digest in reversed(list(enumerate(tests)))}
        shared = [(i, places[d]) for i, d in enumerate(seen["train"] + seen.get("val", [])) if d in places]
        meta["shared_train_test"], meta["first_shared"] = len(shared), shared[0] if shared else None
        with writing(path.parent):
            scratch = path.with_name(f"{path.name}.{uuid4().hex}")
            try:
                save_file(tensors, scratch, {"recombine": json.dumps(meta)})
                os.replace(scratch, path)
            except SafetensorError as error:  # a full disk
                raise OSError(str(error)) from error
            finally:
                scratch.unlink(missing_ok=True)

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
        meta = self._meta()
        if meta is None:
            raise UsageError(f"no sentences for {self.task} in {self.path}: call prepare_data() first")
        self.meta, pad = meta, self.tokenizer.pad_token_id
        with safe_open(self.path, "np") as file:
            here = set(file.keys())

            def load(split: str) -> Texts:
                get = lambda key: file.get_tensor(f"{split}.{key}") if f"{split}.{key}" in here else None  # noqa: E731
                return Texts(get("ids"), get("ends"), get("types"), get("labels"), pad)

            splits = {split: load(split) for split in meta["splits"]}
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
                held[self._cut(self.train.labels)] = True
                self.train, self.val = self.train.take(np.flatnonzero(~held)), self.train.take(np.flatnonzero(held))
        else:
            self.train = join(self.train, splits["val"]) if "val" in splits else self.train
            self.val = self.test if self.select == "test" else None
        for line in meta["differences"]:
            announce(f"{self.name} {self.task}: {line}")
        if shared := meta["shared_train_test"]:
            train, test = meta["first_shared"]
            where = f"the first is row {train} of train and {test} of test"
            announce(f"{self.name} {self.task}: {shared} rows of train are in test too, {where}")

    def _cut(self, labels: np.ndarray) -> np.ndarray:
        count = max(1, round(HELD_OUT * len(labels)))
        return stratified(labels, count, self.seed) if self.classes else shuffled(len(labels), self.seed)[:count]

    @property
    def info(self) -> dict[str, Any]:
        """What a result must record about its data."""
        sizes = {split: len(getattr(self, split) or ()) for split in ("train", "val", "test")}
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

    # Loaders

    def _buckets(self, split: Texts, sampler, bucket: int, generator=None, start=(0, 0)) -> DataLoader:
        return self._loader(split, Buckets(sampler, self.batch_size, False, split.lengths, bucket, generator), start)

    def train_dataloader(self) -> DataLoader:
        """Other batches every epoch, the same ones for the same seed."""
        generator = torch.Generator()
        sampler = RandomSampler(self.train, generator=generator)
        return self._buckets(self.train, sampler, self.bucket, generator, self.start)

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.val is None else self._all(self.val)

    def test_dataloader(self) -> DataLoader:
        return self._all(self.test)

    def _all(self, split: Texts) -> DataLoader:
        return self._buckets(split, SequentialSampler(split), len(split))  # one bucket: by length

    def sample(self) -> dict[str, Tensor]:
        """A batch of one, of the training data's median length."""
        return self.train.__getitems__([int(np.argsort(self.train.lengths, kind="stable")[len(self.train) // 2])])


def encode(tokenizer, rows: list[Row], max_length: int) -> tuple[dict[str, np.ndarray], int]:
    """Token ids with the special tokens around them, as `Texts` keeps them, and how many rows were cut short."""
    typed = len(rows[0]) == 2 and "token_type_ids" in tokenizer.model_input_names
    ids, types, lengths, cut = [], [], [], 0
    for start in range(0, len(rows), PORTION):
        columns = [list(column) for column in zip(*rows[start : start + PORTION], strict=True)]
        made = tokenizer(*columns, truncation=True, max_length=max_length)
        lengths += [len(row) for row in made["input_ids"]]
        ids += [np.array(row, np.int32) for row in made["input_ids"]]
        types += [np.array(row, np.uint8) for row in made["token_type_ids"]] if typed else []
        cut += sum(bool(encoding.overflowing) for encoding in made.encodings)
    out = {"ids": np.concatenate(ids), "ends": np.cumsum(lengths)}
    return out | ({"types": np.concatenate(types)} if typed else {}), cut


def join(a: Texts, b: Texts) -> Texts:
    """One after the other."""
    types = None if a.types is None else np.concatenate([a.types, b.types])
    ids, labels = np.concatenate([a.ids, b.ids]), np.concatenate([a.labels, b.labels])
    return Texts(ids, np.cumsum(np.concatenate([a.lengths, b.lengths])), types, labels, a.pad)


def fingerprint(tokenizer) -> str:
    """sha256 of all that a tokenizer does; how it was last told to cut and to pad is not part of that."""
    said = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
