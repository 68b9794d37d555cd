"""What every stage works on: one model, a method or two, one data set, one folder."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig
from torch import Tensor, nn

from recombine.core import checkpoint
from recombine.core.budget import Budget
from recombine.data.batch_sampler import seed_of
from recombine.evaluation.linear_probe import Probe
from recombine.methods import Method
from recombine.runtime import progress
from recombine.training import distributed, objectives, resume


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
    calibration: L.LightningDataModule | None = None  # what calibrates, if not the data itself
    others: dict[str, L.LightningDataModule] = field(default_factory=dict)  # tasks that `analyse` probes
    probe: Probe | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, dict[str, list]] = field(default_factory=dict)  # of each training, by epoch
    labels: dict[str, str] = field(default_factory=dict)  # compressor, method: what the user called them
    logger: Any = None  # loggers.Watch while the run is watched

    @contextmanager
    def timed(self, part: str):
        start = time.perf_counter()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.perf_counter() - start, 3)

    @property
    def state(self) -> Path:
        """Where it keeps what an interrupted run goes on from."""
        return resume.folder(self.out, self.cfg)

    def phase(self, name: str, work: Callable[[], None], base: nn.Module | None = None) -> None:
        """Rewrites `model` by `work`, or takes what an earlier process, or the first rank, left of that.

        base: the model before any rewriting; None: `model` is that.
        """
        path, before = self.state / f"{name}.safetensors", dict(self.seconds)
        torch.manual_seed(seed_of(self.cfg.seed, name))
        done = resume.sealed(path) if distributed.rank() == 0 else None
        if done is None and distributed.rank() == 0:
            work()
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
                if name not in self.model.recombined.own:  # laid out as when it is loaded: sums come out the same
                    tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
            checkpoint.save(self.model, path)
            resume.seal(path, seconds={k: v - before.get(k, 0.0) for k, v in self.seconds.items()})
        distributed.wait()
        if done is not None or distributed.rank() > 0:
            self.model = checkpoint.load(path, base or self.model)
            for part, seconds in (done or {}).get("seconds", {}).items():
                self.seconds[part] = round(self.seconds.get(part, 0.0) + seconds, 3)

    def task(self, label_smoothing: float = 0.0) -> objectives.Task:
        return objectives.build(self.data, label_smoothing)

    def fetch(self, dataset, indices: list[int]):
        """A batch of those samples as a model takes it, on its device."""
        return objectives.fetch(self.data, dataset, indices, next(self.model.parameters()).device)

    def sample(self):
        """The model's input for one sample: images (1, 3, H, W), or a dict of its keyword arguments."""
        if hasattr(self.data, "sample"):  # texts differ in length: the module says which one is typical
            batch = move_data_to_device(self.data.sample(), next(self.model.parameters()).device)
        else:
            batch = self.fetch(self.data.train, [0])
        return (
            {k: v for k, v in batch.items() if k not in objectives.NOT_INPUTS} if isinstance(batch, dict) else batch[0]
        )

    def losses(self) -> Iterator[Tensor]:
        """The task loss of each calibration batch: the same seeded draw at every call, from the training data or those
        of `calibration`.

        All batches are of one size, as a mean over fewer samples gives each of them larger gradients.
        """
        wanted, size = self.cfg.calibration.samples, self.cfg.calibration.batch_size
        data, device = self.calibration or self.data, next(self.model.parameters()).device
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(self.cfg.seed))
        wanted = min(wanted, len(order))
        order, task = order[: wanted - wanted % size if wanted > size else wanted].tolist(), objectives.build(data)
        for start in progress.of(range(0, len(order), size), "calibration", "batches"):
            loss, _ = task.loss(self.model, objectives.fetch(data, data.train, order[start : start + size], device))
            yield loss
