"""What all pictures with prompts share: batches for a model that learns to take noise away.

A batch is a dict: pixels uint8 (B, 3, S, S), which become float32 in [-1, 1] on the device; the tokens of each
picture's prompt, as the model's tokenizer gives them; draw int64 (B,), the seeds of each row's noise; and labels int64
(B,), 1 for a picture that is to be learnt and 0 for one that shows what the model could draw before.

In training the seeds follow from the run's seed, the step and the row, so a run can go on after any step. Elsewhere
they are the rows' own numbers: two passes over the same rows see the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recombine.data.base import SPLITS, DataModule
from recombine.data.batch_sampler import seed_of
from recombine.errors import UsageError
from recombine.runtime.kinds import BatchSize, Count, PartialShare, Pixels, Seed, Word, Workers

Tokens = dict[str, Tensor]  # input_ids int64 (N, T), and perhaps attention_mask (N, T)


class Asked(NamedTuple):
    """A prompt that a model is tested by.

    kind: subject, class or other. beside: real pictures of that kind, uint8 (N, 3, S, S); None: there are none.
    subject: those of the subject itself, whatever the kind. plain: the prompt for who does not know the subject's word;
    None: as it is.
    """

    prompt: str
    kind: str
    beside: Tensor | None = None
    subject: Tensor | None = None
    plain: str | None = None


def at_once(size: int) -> int:
    """How many pictures of that many pixels a side are drawn together: 16 of 256 or less, 4 of 512.

    >>> at_once(32), at_once(512), at_once(2048)
    (16, 4, 1)
    """
    return max(1, min(16, 2**20 // size**2))


class Prompted(Dataset):
    """Rows of pictures with prompts.

    Args:
        pixels: takes a list of rows and gives uint8 (B, 3, S, S).
        prompt: int64 (N,), which of the tokens' rows is the prompt of each row.
        tokens: of all prompts.
        label: of all rows.
    """

    def __init__(self, pixels: Callable[[list[int]], Tensor], prompt: np.ndarray, tokens: Tokens, label: int = 1):
        self.pixels, self.prompt, self.tokens, self.label = pixels, torch.as_tensor(prompt), tokens, label

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch."""
        which = self.prompt[indices]
        tokens = {key: value[which] for key, value in self.tokens.items()}
        labels = torch.full((len(indices),), self.label)
        return {"pixels": self.pixels(indices)} | tokens | {"draw": torch.tensor(indices), "labels": labels}


class PromptedData(DataModule):
    """Pictures with prompts. A subclass sets `name` and writes `asked`, `prepare_data`, `setup` and `info`.

    Args:
        image_size: pixels of a side, S; None: the model's.
        batch_size: of the run, over all its devices.
        drop_prompt: share of the training rows that lose their prompt, so that guidance has something to compare with.
        limit: pictures a split; None: all.

    Raises:
        UsageError: a value that is out of range.
    """

    objective, metric = "denoising", "loss"
    tokenizer: Callable[[Sequence[str]], Tokens] | None = None
    empty: Tokens

    def __init__(
        self,
        *,
        task: Word | None = None,
        image_size: Pixels | None = None,
        batch_size: BatchSize = 4,
        seed: Seed = 0,
        num_workers: Workers = 0,
        limit: Count | None = None,
        drop_prompt: PartialShare = 0.0,
    ):
        super().__init__()
        self.task, self.image_size, self.batch_size, self.seed = task, image_size, batch_size, seed
        self.num_workers, self.limit, self.drop_prompt = num_workers, limit, drop_prompt

    def attach_model(self, source: Mapping, objective: str, tokenizer: Callable[[], Any] | None) -> None:
        if objective != "denoising":
            why = f"data={self.name} teaches to draw, model {source['name']} does not draw"
            raise UsageError(f"{why}: take model=tiny_diffusion or model=sd21_base")
        size = source["image_size"]
        if self.image_size not in (None, size):
            why = f"the model draws {size} x {size} pixels"
            raise UsageError(f"data.image_size={self.image_size}: {why}; leave it out, or set model.image_size too")
        self.image_size, self.tokenizer = size, tokenizer()
        self.empty = self.tokenizer([""])

    def asked(self, prompts: Sequence[str] | None) -> list[Asked]:
        """What the model is tested by. prompts: of `sample.prompts`; None: the data's own.

        Before `setup` it checks them, and has no pictures beside them.

        Raises:
            UsageError: one of them cannot be asked for.
        """
        raise NotImplementedError

    def tokens(self, prompts: Sequence[str]) -> Tokens:
        """The tokens of prompts, all of one length, the empty prompt among them so that it can take their place."""
        if self.tokenizer is None:
            call = "module.attach_model(**models.for_data(model.recombine_source))"
            raise UsageError(f"data {self.name!r} has no tokenizer: call {call} first")
        found = self.tokenizer([*prompts, ""])
        self.empty = {key: value[-1:] for key, value in found.items()}
        return {key: value[:-1] for key, value in found.items()}

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Pixels in [-1, 1]; while Lightning trains also the step's seeds, and prompts that are dropped."""
        if batch["pixels"].dtype != torch.uint8:
            return batch
        batch = batch | {"pixels": batch["pixels"].float() / 127.5 - 1}
        if self.trainer is None or not self.trainer.training:
            return batch
        step = seed_of(self.seed, self.trainer.global_step, self.trainer.global_rank) & (2**40 - 1)
        batch["draw"] = batch["draw"] * 1_000_003 + step
        if self.drop_prompt:
            generator = torch.Generator().manual_seed(step)
            drop = (torch.rand(len(batch["draw"]), generator=generator) < self.drop_prompt).to(batch["pixels"].device)
            for key, value in self.empty.items():
                batch[key] = torch.where(drop[:, None], value.to(batch[key].device), batch[key])
        return batch

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each split."""
        return {split: len(getattr(self, split) or ()) for split in SPLITS}
