"""What a training keeps and prints: its curves, a line an epoch, and the weights that validation likes best."""

import math
import sys
import time

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, TQDMProgressBar
from torch import Tensor, nn
from tqdm import tqdm

from recombine.core import checkpoint
from recombine.runtime import progress
from recombine.training import distributed
from recombine.training.sharding import Sharded, trained_weights


class Curves(Callback):
    """Keeps the curves of a training: {"train/loss": [...], "val/loss": [...], "val/acc": [...], ...}.

    Each has one number an epoch; None stands for nan. train/loss is the mean over the epoch's steps, each with the
    weights of that step.
    """

    def __init__(self):
        self.curves: dict[str, list[float | None]] = {}
        self.loss, self.steps = 0.0, 0

    def on_train_batch_end(self, trainer, lit, outputs, batch, index) -> None:
        """Adds the loss of a step."""
        loss = outputs.get("mean", outputs["loss"])  # of one of the batches that make a step
        self.loss, self.steps = self.loss + loss.detach().float(), self.steps + 1  # no wait for the GPU

    def on_train_epoch_end(self, trainer, lit) -> None:
        """Appends one number to every curve."""
        if not self.steps:  # a resumed training, and an earlier process has this epoch
            return
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        metrics["train/loss"] = float(trainer.strategy.reduce(self.loss / self.steps, reduce_op="mean"))
        self.loss, self.steps = 0.0, 0
        for name, value in metrics.items():
            self.curves.setdefault(name, []).append(None if math.isnan(value) else float(f"{value:.5g}"))

    def state_dict(self) -> dict:
        """What a training state keeps of the curves: of the epoch's losses, the sum of each rank."""
        return {"curves": self.curves, "loss": distributed.gather(float(self.loss)), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Goes on with the curves of an earlier process."""
        losses = state["loss"] if isinstance(state["loss"], list) else [state["loss"]]  # one number in old states
        same = len(losses) == distributed.count()
        self.loss = losses[distributed.rank()] if same else sum(losses) / len(losses)
        self.curves, self.steps = state["curves"], state["steps"]


class Epochs(Callback):
    """Prints a line for an epoch where stderr is a file, at most one in `progress.EVERY` seconds.

    Args:
        what: the name of the training, for example "distillation".
    """

    def __init__(self, what: str):
        self.what, self.last = what, time.monotonic()

    def on_train_epoch_end(self, trainer, lit) -> None:
        """Prints the epoch's scores, at most once in `progress.EVERY` seconds."""
        quiet = not progress.is_shown() or sys.stderr.isatty()
        if quiet or time.monotonic() - self.last < progress.EVERY:
            return
        self.last = time.monotonic()
        scores = ", ".join(f"{key} {value:.4g}" for key, value in sorted(trainer.callback_metrics.items()))
        done, total = trainer.current_epoch + 1, trainer.max_epochs
        print(f"{self.what}: epoch {done} of {total}, {scores}", file=sys.stderr, flush=True)


class Bars(TQDMProgressBar):
    """Lightning's bars on stderr, named after the work, with epochs counted from 1.

    A line is at most as wide as the terminal: the bar gives way to the words beside it.

    Args:
        what: the name of the work, for example "training".
    """

    BAR_FORMAT = "{desc}|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def bar(self, what: str, position: int = 0) -> tqdm:
        """A bar of this style. position: lines below the first bar."""
        options = {"desc": f"{what}: ", "position": position, "leave": position == 0, "disable": self.is_disabled}
        return tqdm(**options, dynamic_ncols=True, file=sys.stderr, smoothing=0, bar_format=self.BAR_FORMAT)

    def init_train_tqdm(self) -> tqdm:
        """The training's bar."""
        return self.bar(self.what)

    def init_validation_tqdm(self) -> tqdm:
        """The validation's bar, below the training's."""
        return self.bar("validation", 1)

    def init_test_tqdm(self) -> tqdm:
        """The test's bar."""
        return self.bar(self.what)

    def on_train_epoch_start(self, trainer, *_) -> None:
        """Starts the training's bar anew, under the epoch's number."""
        self.train_progress_bar.reset(self.total_train_batches)
        self.train_progress_bar.set_description(
            f"{self.what}, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        )

    def on_validation_batch_start(self, trainer, lit, batch, batch_idx, dataloader_idx=0) -> None:
        """Starts the validation's bar anew with each loader."""
        if self.has_dataloader_changed(dataloader_idx):
            self.val_progress_bar.reset(self.total_val_batches_current_dataloader)

    def on_test_batch_start(self, trainer, lit, batch, batch_idx, dataloader_idx=0) -> None:
        """Starts the test's bar anew with each loader."""
        if self.has_dataloader_changed(dataloader_idx):
            self.test_progress_bar.reset(self.total_test_batches_current_dataloader)

    def get_metrics(self, trainer, lit) -> dict[str, str]:
        """The training's loss and the validation's score; its loss where there is no score. More would not fit."""
        metrics = super().get_metrics(trainer, lit)
        scores = [key for key in metrics if key.startswith("val/")]
        shown = {"loss": metrics["train/loss"]} if "train/loss" in metrics else {}
        shown |= {key: metrics[key] for key in scores if key != "val/loss" or len(scores) == 1}
        return {key: f"{value:.3g}" for key, value in shown.items()}


class Patience(EarlyStopping):
    """Stops where validation gets no better. Epochs in which the model has not its final form do not count."""

    def _run_early_stopping_check(self, trainer) -> None:
        if trainer.lightning_module.is_final_form:
            super()._run_early_stopping_check(trainer)


class KeepBest(Callback):
    """Keeps the weights that validation likes best, in memory and as a checkpoint, and puts them back at the end.

    Without validation data the last weights are kept.

    Args:
        monitor: the metric, for example "val/acc".
        mode: "max" where more is better, "min" where less is.
        path: of the checkpoint.
    """

    def __init__(self, monitor: str, mode: str, path):
        self.monitor, self.direction, self.path = monitor, 1 if mode == "max" else -1, path
        self.best, self.epoch, self.weights = -math.inf, None, None
        self.inherited = False  # the weights are an earlier process's, and the file may be of an epoch that it lost

    def on_train_start(self, trainer, lit) -> None:
        """Names the file of an earlier process as the last good checkpoint."""
        if self.inherited:
            lit.last_good = str(self.path)

    def on_validation_start(self, trainer, lit) -> None:
        """Has all ranks validate one model: each has running means of its own rows, and the first's are kept."""
        distributed.follow_first(kept_buffers(lit.model).values())

    def on_validation_end(self, trainer, lit) -> None:
        """Keeps the weights of an epoch that is better than all before it. A divergence ends the training."""
        lit.refuse_divergence(trainer.callback_metrics)
        if self.monitor not in trainer.callback_metrics or not lit.is_final_form:
            return
        value = self.direction * trainer.callback_metrics[self.monitor].item()
        if value > self.best:
            self.best, self.epoch = value, trainer.current_epoch
            self.keep(trainer, lit)

    def on_train_epoch_end(self, trainer, lit) -> None:
        """A divergence ends the training where no validation sees it."""
        if not trainer.enable_validation:
            lit.refuse_divergence({})

    def keep(self, trainer, lit) -> None:
        """Copies the trained weights to the CPU, and has the first rank write the checkpoint."""
        self.inherited = False
        sharded = isinstance(trainer.strategy, Sharded)
        tensors = trained_weights(lit.model) | kept_buffers(lit.model) if sharded else moving(lit.model)
        self.weights = {n: t.detach().cpu().clone() for n, t in tensors.items()}
        if sharded:  # `adapt.fit` writes the file, of a model that is whole
            return
        if trainer.is_global_zero:
            checkpoint.save_best(lit.model, self.path)
        lit.last_good = str(self.path)

    def on_fit_end(self, trainer, lit) -> None:
        """Puts the best weights back into the model."""
        if self.weights is None:
            lit.refuse_divergence({})
            distributed.follow_first(kept_buffers(lit.model).values())
            self.epoch, self.best = trainer.current_epoch - 1, math.nan
            self.keep(trainer, lit)
        if not isinstance(trainer.strategy, Sharded):
            self.restore(lit.model)
            if self.inherited and trainer.is_global_zero:
                checkpoint.save_best(lit.model, self.path)

    def restore(self, model: nn.Module) -> None:
        """The kept weights into the model, or into one like it."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, value in self.weights.items():
                tensors[name].copy_(value)

    def state_dict(self) -> dict:
        """What a training state keeps of the best weights."""
        return {"best": self.best, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        """Goes on with the best weights of an earlier process."""
        self.best, self.epoch, self.weights = state["best"], state["epoch"], state["weights"]
        self.inherited = self.weights is not None

    @property
    def value(self) -> float:
        """The best value of the metric that is monitored; nan where there was no validation."""
        return self.direction * self.best


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What a training may change: the parameters that train, and the buffers that a file holds (BatchNorm's means)."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | kept_buffers(model)


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a file holds."""
    kept = model.state_dict().keys()
    return {name: b for name, b in model.named_buffers() if name in kept}
