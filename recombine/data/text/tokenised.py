"""Tokenised sentences: how they are made, kept and put into batches."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from recombine.runtime.assets import writing

PORTION = 10_000  # sentences tokenised at a time

Row = tuple[str, ...]  # one sentence, or two


class Texts(Dataset):
    """Rows of a tokenised split.

    Args:
        ids: int32, the tokens of all sentences one after the other.
        ends: int64 (N,), where in ``ids`` each sentence ends.
        types: uint8 like ids, 0 or 1: of the first or the second sentence of a pair; None where there are no pairs.
        labels: int64 (N,), or float (N,) for regression.
        pad: the token that fills a batch up.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray, types: np.ndarray | None, labels: np.ndarray, pad: int):
        self.ids, self.types, self.labels, self.pad = ids, types, labels, pad
        self.parts: np.ndarray | None = None  # (N,): which part of the split a row is of
        self.lengths = np.diff(ends, prepend=0)
        self.starts = ends - self.lengths

    def take(self, rows: np.ndarray) -> Texts:
        """The rows with these indices (k,), over the same tokens."""
        taken = object.__new__(Texts)
        taken.__dict__ = self.__dict__ | {key: getattr(self, key)[rows] for key in ("labels", "lengths", "starts")}
        return taken

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch, padded to its longest row."""
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
    """Batches of similar lengths. Every row comes once an epoch.

    The sampler's order is taken in portions of ``bucket`` batches. Each portion is sorted by length and cut into
    batches, which are shuffled where there is a generator. ``lengths`` (N,) are those of all rows.
    """

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


def encode(tokenizer, rows: list[Row], max_length: int) -> tuple[dict[str, np.ndarray], int]:
    """Token ids with the special tokens around them, as `Texts` keeps them, and how many rows were cut short."""
    typed = len(rows[0]) == 2 and "token_type_ids" in tokenizer.model_input_names
    ids, types, lengths, cut = [], [], [], 0
    for start in range(0, len(rows), PORTION):
        columns = [list(column) for column in zip(*rows[start : start + PORTION], strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        lengths += [len(row) for row in encoded["input_ids"]]
        ids += [np.array(row, np.int32) for row in encoded["input_ids"]]
        types += [np.array(row, np.uint8) for row in encoded["token_type_ids"]] if typed else []
        cut += sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    out = {"ids": np.concatenate(ids), "ends": np.cumsum(lengths)}
    return out | ({"types": np.concatenate(types)} if typed else {}), cut


def join(a: Texts, b: Texts) -> Texts:
    """The rows of `a`, then those of `b`."""
    types = None if a.types is None else np.concatenate([a.types, b.types])
    ids, labels = np.concatenate([a.ids, b.ids]), np.concatenate([a.labels, b.labels])
    return Texts(ids, np.cumsum(np.concatenate([a.lengths, b.lengths])), types, labels, a.pad)


def write(path: Path, tensors: dict[str, np.ndarray], meta: dict) -> None:
    """A cached file with its description, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with writing(path.parent):
        scratch = path.with_name(f"{path.name}.{uuid4().hex}")
        try:
            save_file(tensors, scratch, {"recombine": json.dumps(meta)})
            os.replace(scratch, path)
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error
        finally:
            scratch.unlink(missing_ok=True)


def description(path: Path) -> dict | None:
    """What `write` was told in a whole cached file, or None when it is missing, cut short or damaged."""
    try:
        with safe_open(path, "np") as file:
            meta, tensors = json.loads(file.metadata()["recombine"]), set(file.keys())
            known = {"differences", "shared_train_test", "first_shared"} <= meta.keys()
            held = {f"{split}.{key}" for split in meta["splits"] for key in ("ids", "ends", "labels")}
            return meta if known and held <= tensors else None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def fingerprint(tokenizer) -> str:
    """sha256 of all that a tokenizer does; how it was last told to cut and to pad is not part of that."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
