"""What the language data modules share.

A batch is {"input_ids" (B, T), "attention_mask" (B, T), "labels" (B, T)}. Labels are the inputs, -100 where there is no
loss: at padding, and at the prompt unless ``loss_on_prompt``. The shift by one token is the objective's.

Rows of train whose prompt, or whose window, is in test too are counted, and said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from recombine.data.base import SPLITS, TokenModule, log_once, require_known
from recombine.data.hub import local_or_hub
from recombine.errors import UsageError
from recombine.runtime.kinds import BatchSize, Count, Seed, Tokens, Word, Workers


class Samples(Protocol):
    """A split: batches, and what tells its rows apart."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]: ...

    def keys(self) -> list[bytes]:
        """What each row is known by, whatever its response."""

    def digest(self) -> str:
        """sha256 of all rows."""


class LanguageData(TokenModule):
    """Text for a causal language model. A subclass sets `name` and `tasks` and writes `build`.

    Args:
        task: of `tasks`.
        batch_size: of the run, over all its devices.
        max_length: tokens of a row, from 8.
        seed: of the order of the training data, and of what is held out of it.
        num_workers: processes that load batches.
        limit: rows a split; None: all.

    Raises:
        UsageError: a value that is out of range, or an unknown task.
    """

    tasks: tuple[str, ...]
    group, objective, metric, num_classes = "language", "lm", "ppl", None
    licence, note = "", ""
    _built_for = None  # the tokenizer that the splits are made with

    def __init__(
        self,
        *,
        task: Word,
        batch_size: BatchSize = 8,
        max_length: Tokens = 256,
        seed: Seed = 0,
        num_workers: Workers = 0,
        limit: Count | None = None,
    ):
        super().__init__()
        require_known("data.task", f"{self.name} task", task, self.tasks)
        self.task, self.batch_size, self.max_length = task, batch_size, max_length
        self.seed, self.num_workers, self.limit = seed, num_workers, limit
        self.origin: dict[str, str] = {}  # for `info`: hub and commit, or root

    def build(self) -> dict[str, Samples]:
        """split -> samples, with what `limit` leaves of each. It may set `licence` and `note`."""
        raise NotImplementedError

    def folder(self, repository: str, revision: str, patterns: list[str], ways: str) -> Path:
        """The user's folder ``root``, or the hub's snapshot, either of which `info` names.

        Raises:
            UsageError: there is neither; ``ways`` says what to do.
        """
        folder = local_or_hub(self.name, self.root, repository, revision, patterns, ways)
        self.origin = {"hub": repository, "commit": folder.name} if self.root is None else {"root": str(folder)}
        return folder

    def setup(self, stage: str | None = None) -> None:
        """Builds the splits, once for a tokenizer, and says what train and test share."""
        self.require_tokenizer()
        if self._built_for is self.tokenizer:
            return
        for split, samples in self.build().items():
            if not len(samples):
                raise UsageError(
                    f"{self.name} {self.task}: {split} is empty: raise data.limit or lower data.max_length"
                )
            setattr(self, split, samples)
        places = {key: i for i, key in reversed(list(enumerate(self.test.keys())))}
        self.shared = [(i, places[key]) for i, key in enumerate(self.train.keys()) if key in places]  # noqa: SIM118
        if self.shared:
            (train, test), count = self.shared[0], len(self.shared)
            where = f"the first is row {train} of train and {test} of test"
            log_once(f"{self.name} {self.task}: {count} rows of train are in test too, {where}")
        self._built_for = self.tokenizer

    @property
    def info(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "task": self.task,
            "group": self.group,
            "objective": self.objective,
            "metric": self.metric,
            "licence": self.licence,
            "note": self.note,
            "sizes": {split: len(getattr(self, split)) for split in SPLITS},
            "sha256": {split: getattr(self, split).digest() for split in SPLITS},
            "shared_train_test": len(self.shared),
            "first_shared": self.shared[0] if self.shared else None,
            "protocol": "train on train, choose on val, test once",
            "harness": list(self.harness),
            "max_length": self.max_length,
            "seed": self.seed,
            "limit": self.limit,
            **self.origin,
        }
