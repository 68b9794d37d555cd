"""What every stage works on: one model, a method or two, one data set, one folder."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig
from torch import Tensor, nn

from recombine import tasks
from recombine.budget import Budget
from recombine.methods import Method
from recombine.probe import Probe


@dataclass
class Run:
    """cfg is the whole composed configuration; `seconds` fills up as parts of the run finish."""

    cfg: DictConfig
    out: Path
    model: nn.Module
    method: Method
    budget: Budget
    data: L.LightningDataModule
    compressor: Method | None = None  # compresses first, then the method adapts
    probe: Probe | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str):
        start = time.perf_counter()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.perf_counter() - start, 3)

    def task(self, label_smoothing: float = 0.0) -> tasks.Task:
        return tasks.build(self.data, label_smoothing)

    def fetch(self, dataset, indices: list[int]):
        """A batch of those samples as a model takes it, on its device."""
        return tasks.fetch(self.data, dataset, indices, next(self.model.parameters()).device)

    def sample(self):
        """The model's input for one sample: images (1, 3, H, W), or a dict of its keyword arguments."""
        if hasattr(self.data, "sample"):  # texts differ in length: the module says which one is typical
            batch = move_data_to_device(self.data.sample(), next(self.model.parameters()).device)
        else:
            batch = self.fetch(self.data.train, [0])
        return {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else batch[0]

    def losses(self) -> Iterator[Tensor]:
        """The task loss of each calibration batch: the same seeded draw from the training data at every call.

        All batches are of one size, as a mean over fewer samples gives each of them larger gradients.
        """
        wanted, size = self.cfg.calibration.samples, self.cfg.calibration.batch_size
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(self.cfg.seed))
        wanted = min(wanted, len(order))
        order, task = order[: wanted - wanted % size if wanted > size else wanted].tolist(), self.task()
        for start in range(0, len(order), size):
            loss, _ = task.loss(self.model, self.fetch(self.data.train, order[start : start + size]))
            yield loss
