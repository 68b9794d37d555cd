"""What a training looked like, epoch by epoch: the `curves` of result.json, for the plots of losses."""

import math

from lightning.pytorch.callbacks import Callback


class Curves(Callback):
    """Keeps {"train/loss": [...], "val/loss": [...], "val/acc": [...], ...}, one number an epoch, None where it is not
    finite. train/loss is the mean over the epoch's steps, on the weights that each of them found."""

    def __init__(self):
        self.curves: dict[str, list[float | None]] = {}
        self.loss, self.steps = 0.0, 0

    def on_train_batch_end(self, trainer, lit, outputs, batch, index) -> None:
        self.loss, self.steps = self.loss + outputs["loss"].detach().float(), self.steps + 1  # no wait for the GPU

    def on_train_epoch_end(self, trainer, lit) -> None:
        if not self.steps:  # taken up where this epoch had been written down
            return
        found = {name: value.item() for name, value in trainer.callback_metrics.items()}
        found["train/loss"] = float(trainer.strategy.reduce(self.loss / self.steps, reduce_op="mean"))
        self.loss, self.steps = 0.0, 0
        for name, value in found.items():
            self.curves.setdefault(name, []).append(float(f"{value:.5g}") if math.isfinite(value) else None)

    def state_dict(self) -> dict:
        return {"curves": self.curves, "loss": float(self.loss), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.curves, self.loss, self.steps = state["curves"], state["loss"], state["steps"]
