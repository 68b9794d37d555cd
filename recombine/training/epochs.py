"""What a training shows: bars on a terminal; a line after an epoch, at most two a minute, where stderr is a file."""

import sys
import time

from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from tqdm import tqdm

from recombine.runtime import progress


class Epochs(Callback):
    """Lines in a file, where a bar would show nothing until the end. what: the name of the training."""

    def __init__(self, what: str):
        self.what, self.last = what, time.monotonic()

    def on_train_epoch_end(self, trainer, lit) -> None:
        quiet = not progress.shown or not trainer.is_global_zero or sys.stderr.isatty()
        if quiet or time.monotonic() - self.last < progress.EVERY:
            return
        self.last = time.monotonic()
        scores = ", ".join(f"{key} {value:.4g}" for key, value in sorted(trainer.callback_metrics.items()))
        done, total = trainer.current_epoch + 1, trainer.max_epochs
        print(f"{self.what}: epoch {done} of {total}, {scores}", file=sys.stderr, flush=True)


class Bars(TQDMProgressBar):
    """Lightning's bars on stderr, named after the work, with epochs counted from 1. what: the name of the work.

    A line is at most as wide as the terminal: the bar gives way to the words beside it.
    """

    BAR_FORMAT = "{desc}|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def bar(self, what: str, position: int = 0) -> tqdm:
        knobs = {"desc": f"{what}: ", "position": position, "leave": position == 0, "disable": self.is_disabled}
        return tqdm(**knobs, dynamic_ncols=True, file=sys.stderr, smoothing=0, bar_format=self.BAR_FORMAT)

    def init_train_tqdm(self) -> tqdm:
        return self.bar(self.what)

    def init_validation_tqdm(self) -> tqdm:
        return self.bar("validation", 1)

    def init_test_tqdm(self) -> tqdm:
        return self.bar(self.what)

    def on_train_epoch_start(self, trainer, *_) -> None:
        self.train_progress_bar.reset(self.total_train_batches)
        self.train_progress_bar.set_description(
            f"{self.what}, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        )

    def on_validation_batch_start(self, trainer, lit, batch, batch_idx, dataloader_idx=0) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            self.val_progress_bar.reset(self.total_val_batches_current_dataloader)

    def on_test_batch_start(self, trainer, lit, batch, batch_idx, dataloader_idx=0) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            self.test_progress_bar.reset(self.total_test_batches_current_dataloader)

    def get_metrics(self, trainer, lit) -> dict[str, str]:
        """The training's loss and the validation's score; its loss where there is no score. More would not fit."""
        found = super().get_metrics(trainer, lit)
        scores = [key for key in found if key.startswith("val/")]
        shown = {"loss": found["train/loss"]} if "train/loss" in found else {}
        shown |= {key: found[key] for key in scores if key != "val/loss" or len(scores) == 1}
        return {key: f"{value:.3g}" for key, value in shown.items()}
