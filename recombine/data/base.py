"""The contract of a data module, and what all of them share: loaders, a cache that one process builds, settings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchmetrics import MetricCollection

from recombine.data.batch_sampler import ShardedBatchSampler
from recombine.errors import UsageError, did_you_mean
from recombine.runtime.assets import cache_dir, writing

SPLITS = ("train", "val", "test")


class DataModule(lightning.LightningDataModule):
    """One task of a data set: three splits, and everything that the rest of the program may ask of them.

    Order of calls: ``__init__`` with the keys of the YAML, `attach_model`, `prepare_data` (of several processes on a
    machine, one), `setup`, `ask`, `resume_at` where an interrupted run goes on; then the loaders, `sample` and `info`.

    `setup` sets ``train``, ``val`` and ``test``. A split is a torch ``Dataset`` with ``__getitems__(indices)``, which
    returns a whole batch: (images uint8 (B, 3, H, W), labels (B,)), or a dict of tensors with ``labels`` in it. ``val``
    is None where nothing chooses the epoch and the last one counts.
    """

    # What a subclass sets, on the class or in __init__

    name: str  # what `data=` says
    label: ClassVar[str] = ""  # the data set in human words; empty: its name
    task_labels: ClassVar[dict[str, str]] = {}  # tasks in human words, where their names are not
    task: str | None
    group: str = ""  # tasks of one group share a mean in the table of a suite
    suite: ClassVar[dict[str, str]] = {}  # task -> group, in order: what data.task=all runs
    experiment: ClassVar[str] = ""  # the paper's table of this suite, e.g. "crisp/tab01"

    objective: str = "classification"  # or "regression", "lm", "denoising": which loss
    metric: str = "acc"  # what validation likes best, of `metrics` or of the objective's own
    num_classes: int | None = None  # outputs of the classifier; None: the model has none
    uses_pretrained_classes = False  # the very classes of pretrained weights' own classifiers, in their order
    harness: tuple[str, ...] = ()  # tasks of recombine.evaluation.harness that show what was learnt
    root: str | Path | None = None  # the user's folder with the data; None: packages or the hub

    batch_size: int
    num_workers: int
    seed: int
    train: Dataset
    val: Dataset | None
    test: Dataset
    _start = (0, 0)

    @property
    def task_of_model(self) -> str:
        """What it asks of a model that can be several: lm (the next token), or classes of a text or an image."""
        return "lm" if self.objective == "lm" else "text" if isinstance(self, TokenModule) else "image"

    # What a subclass writes

    def attach_model(self, source: Mapping, objective: str, tokenizer: Callable[[], Any] | None) -> None:
        """Takes from the model what the data need of it: the size and statistics of pictures, or the tokenizer.

        Call it before `prepare_data`: ``module.attach_model(**models.for_data(model.recombine_source))``.

        Args:
            source: ``model.recombine_source``.
            objective: "lm" for a causal language model, "denoising" for one that draws, "classification" for a model
                with a classifier.
            tokenizer: returns the model's tokenizer; None for a model that sees pictures.

        Raises:
            UsageError: the model cannot read these data.
        """
        raise NotImplementedError

    @property
    def info(self) -> dict[str, Any]:
        """What a result records about its data, in types that JSON knows. Read it after `setup`."""
        raise NotImplementedError

    # What a subclass may replace

    @property
    def title(self) -> str:
        """Data set and task in human words, e.g. "VTAB-1K CIFAR-100"."""
        return " ".join(filter(None, (self.label or self.name, self.task_labels.get(self.task, self.task))))

    @property
    def foreseen(self) -> dict[str, int]:
        """Samples of each split, as far as they are known before anything is fetched or read."""
        return {}

    def metrics(self) -> MetricCollection | None:
        """New metrics of logits and labels, among them `metric`. None: those of the objective."""
        return None

    def ask(self, model: Any) -> None:
        """Takes from the model what only it can make, before anything of it is rewritten; called after `setup`."""

    def sample(self):
        """A typical batch of one training sample, as the loaders give it."""
        return self.train.__getitems__([0])

    def shuffled_batches(self, split: Dataset) -> BatchSampler:
        """Row numbers of a split's batches in random order; its generator is seeded anew for every epoch."""
        sampler = RandomSampler(split, generator=torch.Generator())
        return BatchSampler(sampler, self.batch_size, drop_last=False)

    def ordered_batches(self, split: Dataset) -> BatchSampler:
        """Row numbers of a split's batches, for scoring."""
        return BatchSampler(SequentialSampler(split), self.batch_size, drop_last=False)

    # What all share

    def resume_at(self, epoch: int, batch: int) -> None:
        """The next training loader begins with this batch of this epoch, as if those before it had been read."""
        self._start = (epoch, batch)

    def train_dataloader(self) -> DataLoader:
        """Another order every epoch, the same ones for the same seed."""
        return self._loader(self.train, self.shuffled_batches(self.train), self._start)

    def val_dataloader(self) -> DataLoader | list:
        """Every row once; without a validation set, nothing."""
        return [] if self.val is None else self._loader(self.val, self.ordered_batches(self.val))

    def test_dataloader(self) -> DataLoader:
        """Every row once."""
        return self._loader(self.test, self.ordered_batches(self.test))

    def _loader(self, split: Dataset, batches: BatchSampler, start: tuple[int, int] = (0, 0)) -> DataLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(
            split,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_batch,
            batch_sampler=ShardedBatchSampler(batches, self.seed, rank, world, start),
        )


class CachedModule(DataModule):
    """Data that is made once into a file, which every later run maps or reads.

    A subclass says where the samples come from (`source`) and what identifies them (`identity`).
    """

    def source(self):
        """The samples and labels of every split. It may be slow: it is called when there is no cached file."""
        raise NotImplementedError

    def identity(self) -> str:
        """Changes when the samples, their labels or their split change. It must be cheap: every run asks."""
        raise NotImplementedError

    def check(self, digests: dict[str, str]) -> None:
        """Sees the sha256 of every whole split (split -> digest) before anything is cached, and may refuse."""

    @property
    def path(self) -> Path:
        """The cached file. Its name has `identity` and all settings in it that change what is in the file."""
        raise NotImplementedError

    def cached(self) -> dict | None:
        """The description in a whole cached file, or None when it is missing, cut short or damaged."""
        raise NotImplementedError

    def build_cache(self) -> None:
        """Writes the file, whole or not at all."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Makes the cached file where there is none; of several processes, one does and the others wait."""
        if self.cached() is None:
            with exclusive_build(self.path.stem):
                if self.cached() is None:  # still, and not built by another while this one waited
                    self.build_cache()


class TokenModule(DataModule):
    """Data that a model reads through its tokenizer."""

    tokenizer = None

    def attach_model(self, source: Mapping, objective: str, tokenizer: Callable[[], Any] | None) -> None:
        if tokenizer is None:
            raise UsageError(f"model {source['name']} sees pictures, not text: take model=minilm, or data=offline")
        if objective == "denoising":
            raise UsageError(f"data={self.name} is text alone, model {source['name']} draws: take data=dreambooth")
        if (self.objective == "lm") != (objective == "lm"):
            fix = "model=smollm2_135m" if self.objective == "lm" else "model=minilm"
            raise UsageError(f"data={self.name} is no task for model {source['name']}: take {fix}, or other data")
        self.tokenizer = tokenizer()

    def require_tokenizer(self) -> None:
        """Refuses with a UsageError before `attach_model`."""
        if self.tokenizer is None:
            raise UsageError(
                f"data {self.name!r} has no tokenizer: call "
                "module.attach_model(**models.for_data(model.recombine_source)) first"
            )


def require_known(key: str, what: str, name: Any, known: Collection[str], more: str = "") -> None:
    """Refuses a name that is not among the known ones.

    Raises:
        UsageError: names the key, the one that is closest and all others. what: one of them, in words. more: its end.
    """
    if name not in known:
        hint = did_you_mean(str(name), list(known))
        raise UsageError(f"{key}={name}: there is no such {what}; {hint}choose from {', '.join(known)}{more}")


@contextmanager
def exclusive_build(what: str) -> Iterator[None]:
    """Lets one process at a time through. The lock dies with its process."""
    with writing(folder := cache_dir() / "locks"):
        lock = FileLock(folder / f"{what}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log_once(f"{what}: another process builds it, waiting")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@cache
def log_once(line: str) -> None:
    """A line on stderr, once a process, and of several ranks only by the first."""
    if rank_zero_only.rank == 0:
        print(line, file=sys.stderr)


def _batch(batch):
    return batch  # __getitems__ made it one already
