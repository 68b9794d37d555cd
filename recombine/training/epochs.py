"""A line on stderr after an epoch, at most every half minute: Lightning's bar shows nothing in a file until the end."""

import sys
import time

from lightning.pytorch.callbacks import Callback

from recombine.runtime import progress


class Epochs(Callback):
    """what: the name of the training."""

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
