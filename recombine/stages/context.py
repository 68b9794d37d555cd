"""What every stage works on: one model, a method or two, one data set, one folder."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor, nn

from recombine.core import adapters, checkpoint, pair, quantizing, rewrite
from recombine.core.budget import Budget
from recombine.core.memory import Memory
from recombine.core.method import Method
from recombine.data.base import DataModule
from recombine.data.batch_sampler import seed_of
from recombine.errors import UsageError
from recombine.evaluation.linear_probe import Probe
from recombine.models import roles
from recombine.runtime import memory, progress
from recombine.stages.settings import RunSettings
from recombine.training import distributed, finite, objectives, resume


@dataclass
class RunContext:
    """One run while it works.

    out: the run's folder. state: the folder of what an interrupted run goes on from.
    compressor: compresses first, then `method` adapts; None: there is only the method.
    calibration_data: what calibrates, if not the data itself. transfer_data: other tasks, which `analyse` probes.
    base: the file of the compressed checkpoint that `model` came from; None: it is the pretrained one.
    continued: the method is the one that made the base, so that it trains what is there.
    merged: what the method did, where it was merged before the compressor came.
    original: the same word for runs that start from equal models with equal data.
    labels: what the user called the compressor and the method, by "compressor" and "method".
    pictures: what was drawn for each prompt, as files in `out`.
    seconds, curves: fill up as parts of the run finish. earlier: those of the seconds that earlier processes took.
    choices: the error of each of the bits, and of their mix, that quantize.bits=auto chose from; None: nothing was.
    logger: `loggers.RunLogger` while the run is watched.
    """

    settings: RunSettings
    out: Path
    state: Path
    model: nn.Module
    method: Method
    budget: Budget
    data: DataModule
    compressor: Method | None = None
    calibration_data: DataModule | None = None
    transfer_data: dict[str, DataModule] = field(default_factory=dict)
    base: Path | None = None
    continued: bool = False
    merged: rewrite.Step | None = None
    original: str = field(default_factory=token_hex)
    labels: dict[str, str] = field(default_factory=dict)
    probe: Probe | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    earlier: float = 0.0
    pictures: dict[str, list[str]] = field(default_factory=dict)
    curves: dict[str, dict[str, list]] = field(default_factory=dict)
    choices: dict[str, float | None] | None = None
    logger: Any = None

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @property
    def first_method(self) -> Method:
        """The method that compresses: the compressor, or else the method."""
        return self.compressor or self.method

    @contextmanager
    def timed(self, part: str):
        """Adds the seconds of the block to that part's."""
        start = time.perf_counter()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.perf_counter() - start, 3)

    def checkpointed_step(self, name: str, work: Callable[[], None], base: nn.Module | None = None) -> None:
        """Rewrites `model` by `work`, or loads the result where it is there already.

        The first rank does the work, the others load its file. A resumed run loads the file of an earlier process.

        Args:
            name: of the file, for example "rewritten".
            base: the model before any rewriting; None: `model` is that.
        """
        path, before = self.state / f"{name}.safetensors", dict(self.seconds)
        torch.manual_seed(seed_of(self.settings.seed, name))
        done = resume.verified_manifest(path) if distributed.rank() == 0 else None
        if done is None and distributed.rank() == 0:
            work()
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
                if name not in self.model.recombined.untouched:  # laid out as when it is loaded: equal sums
                    tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
            self.save_difference(path)
            seconds = {k: v - before.get(k, 0.0) for k, v in self.seconds.items()}
            resume.write_manifest(path, seconds=seconds, notes=self.model.recombined.notes)
        distributed.wait()
        if done is not None or distributed.rank() > 0:
            if self.base is None:
                self.model = checkpoint.load(path, base or self.model)
            else:
                self.model = adapters.become(self.model, path)
            if done is not None:
                self.model.recombined.notes = done.get("notes", [])
            for part, seconds in (done or {}).get("seconds", {}).items():
                self.seconds[part] = round(self.seconds.get(part, 0.0) + seconds, 3)
                self.earlier += seconds

    def save_difference(self, path: Path) -> None:
        """Writes what the model has beside the one that the run started from."""
        if self.base is None:
            checkpoint.save(self.model, path, whole=False)
        else:
            adapters.save_adapter(self.model, path)

    def rewrite(self, method: Method) -> None:
        """Applies the method and adds up its seconds.

        Where there is a compressor, it keeps the run's budget; a budget of trainable parameters is the method's.
        """
        if not hasattr(self.model, "recombined"):
            finite.refuse_weights(self.model, "the model is not finite; take another model.checkpoint")
        if self.compressor is not None and not hasattr(self.model, "recombined"):
            roles.split_fused(self.model, self.method.targets)  # before the compressor sees a fused qkv
        budget = self.budget  # what was merged adds nothing
        if self.merged is None:
            budget = pair.budget_of(method, self.model, self.budget, self.compressor, self.method)
        with self.timed("retrofit"):
            rewrite.apply(self.model, method, budget, self.losses, self.memory(method))
        label = self.labels.get("method" if method is self.method else "compressor", type(method).__name__)
        finite.refuse_weights(self.model, f"{label} left a model that is not finite; change its fields")

    def rewrite_all(self) -> None:
        """The compressor, where there is one, then the method on what it left."""
        if self.continued:
            rewrite.train_only(self.model, self.model.recombined.trainable)
            return
        if self.compressor is not None:
            self.rewrite(self.compressor)
            rewrite.finish(self.model, self.compressor, alone=False)
        self.rewrite(self.method)
        self.quantize()

    def quantize(self) -> None:
        """Packs what is frozen, where `quantize.bits` asks for it."""
        if (packing := self.budget.packing) is not None:
            with self.timed("quantize"):
                quantizing.quantize(self.model, packing.bits, packing.group)

    def memory(self, method: Method) -> Memory:
        """What the calibration of a method may take, and where its factors wait."""
        folder = self.state / f"{method.key}-{distributed.rank()}"
        limit = memory.parse(self.settings.calibration.memory, "calibration.memory")
        return Memory(limit, folder, "calibration.memory")

    def objective(self, label_smoothing: float = 0.0) -> objectives.Objective:
        """What the data's task is trained and scored by."""
        return objectives.build(self.data, label_smoothing)

    def batch(self, dataset, indices: list[int]):
        """A batch of those samples as a model takes it, on its device."""
        return objectives.fetch(self.data, dataset, indices, self.device)

    def typical_input(self):
        """The model's input for one sample: images (1, 3, H, W), or a dict of its keyword arguments."""
        return objectives.inputs_of(objectives.on_device(self.data, self.data.sample(), self.device))

    @property
    def calibration_rows(self) -> list[int]:
        """The rows of the training set that calibrate."""
        wanted, size = self.settings.calibration.samples, self.settings.calibration.batch_size
        rows = len((self.calibration_data or self.data).train)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.settings.seed))
        wanted = min(wanted, rows)
        return order[: wanted - wanted % size if wanted > size else wanted].tolist()

    def calibration_sha256(self) -> str | None:
        """sha256 of the tokens that calibrate, row by row; None: the data are no text for a language model.

        Raises:
            UsageError: calibration.sha256 asks for others.
        """
        data, wanted = self.calibration_data or self.data, self.settings.calibration.sha256
        if data.objective != "lm":
            return None
        digest = hashlib.sha256()
        for row in self.calibration_rows:
            digest.update(data.train.__getitems__([row])["input_ids"].numpy().tobytes())
        if wanted not in (None, found := digest.hexdigest()):
            why = f"the tokens that calibrate are others ({found}): restore data, seed, samples and model, or say null"
            raise UsageError(f"calibration.sha256={wanted}: {why}")
        return found

    def calibration_batches(self) -> Iterator[Any]:
        """The calibration's batches, the same seeded draw at every call.

        They are of the training data, or of `calibration_data`. All batches are of one size, as a mean over fewer
        samples gives each of them larger gradients.
        """
        data, order = self.calibration_data or self.data, self.calibration_rows
        size = self.settings.calibration.batch_size
        for start in progress.of(range(0, len(order), size), "calibration", "batches"):
            yield objectives.fetch(data, data.train, order[start : start + size], self.device)

    def losses(self) -> Iterator[Tensor]:
        """The task loss of each calibration batch."""
        objective = objectives.build(self.calibration_data or self.data)
        for batch in self.calibration_batches():
            loss, _ = objective.loss(self.model, batch)
            if not torch.isfinite(loss):
                raise UsageError(f"loss={loss.item()} in the calibration: {finite.blame(self.model, batch)}")
            yield loss
