"""LitRecombine, the only LightningModule: a model, the method that made it, and a task."""

import math
from functools import partial

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from recombine.core import checkpoint
from recombine.data.batch_sampler import seed_of
from recombine.errors import UsageError
from recombine.methods import Method
from recombine.models import roles
from recombine.training.objectives import Task, labels_of, parts_of

OPTIMIZERS = {  # optim.name -> how it is made
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


class LitRecombine(L.LightningModule):
    """Trains whatever requires a gradient.

    Args:
        lr, lr_head: peak learning rates of the method's weights and of the classification head.
        optimizer: a key of OPTIMIZERS.
        weight_decay: the optimizer's, on matrices only.
        warmup: share of the steps over which the rates rise linearly from 0.
        schedule: cosine or linear, down to 0; or constant.
        seed: of what is drawn in training (dropout), anew at every step, so that a run can go on after any of them.
    """

    strict_loading = False  # a training state holds what trains, not the backbone

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        task: Task,
        *,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        lr_head: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.1,
        schedule: str = "cosine",
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.method, self.task, self.seed = model, method, task, seed
        self.lr, self.lr_head, self.weight_decay = lr, lr_head, weight_decay
        self.optimizer, self.warmup, self.schedule = optimizer, warmup, schedule
        if optimizer not in OPTIMIZERS:
            raise UsageError(f"optim.name={optimizer}: must be one of {', '.join(OPTIMIZERS)}")
        if schedule not in ("cosine", "linear", "constant"):
            raise UsageError(f"optim.schedule={schedule!r}: must be cosine, linear or constant")
        self.train_metrics = task.metrics().clone("train/")
        self.val_metrics = task.metrics().clone("val/")
        self.test_metrics = task.metrics().clone("test/")
        self.train_metrics.persistent(True)  # an epoch may be taken up in its middle
        self.last_good: str | None = None  # the checkpoint a user can go back to
        self.settled = True  # the model has the form that it will be kept in

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def setup(self, stage: str) -> None:
        self.task.ranks = self.trainer.world_size

    def teardown(self, stage: str) -> None:
        self.task.ranks, self.task.void = 1, False

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        keep = {f"model.{unwrapped(name)}" for name, p in self.model.named_parameters() if p.requires_grad}
        keep |= {f"model.{unwrapped(name)}" for name, _ in self.model.named_buffers()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in keep or k.startswith("train_metrics.")}

    def on_train_batch_start(self, batch, _):
        torch.manual_seed(seed_of(self.seed, type(self.task).__name__, self.global_step, self.global_rank))
        if self.task.moves:
            share = self.global_step / max(1, self.trainer.estimated_stepping_batches - 1)
            self.settled = self.method.advance(self.model, min(1.0, share))

    def training_step(self, batch, index):
        loss, logits = self.loss(batch, self.trainer.train_dataloader, index)
        loss = loss + self.method.penalty(self.model)
        if not torch.isfinite(loss):
            good = f"the last good checkpoint is {self.last_good}" if self.last_good else "no checkpoint was kept yet"
            raise UsageError(
                f"loss={loss.item()} at step {self.global_step} (epoch {self.current_epoch}): training diverged, "
                f"try a smaller optim.lr than {self.lr:g}; {good}"
            )
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self.score(self.train_metrics, logits, batch)
        return loss

    def validation_step(self, batch, index):
        loss, logits = self.loss(batch, self.trainer.val_dataloaders, index)
        self.log("val/loss", loss, prog_bar=True, batch_size=self.weight(batch), sync_dist=True)
        self.score(self.val_metrics, logits, batch)

    def test_step(self, batch, index):
        loss, logits = self.loss(batch, self.trainer.test_dataloaders, index)
        self.log("test/loss", loss, batch_size=self.weight(batch), sync_dist=True)
        self.score(self.test_metrics, logits, batch)

    def loss(self, batch, loader, index: int) -> tuple[Tensor, Tensor | None]:
        """The task's, of which the mean over the ranks is that of the whole batch."""
        if self.task.ranks > 1:
            self.task.void = loader.batch_sampler.void(index)
        return self.task.loss(self.model, batch)

    def weight(self, batch) -> int:
        """How much the whole batch, all ranks' parts together, counts in the loss of its split."""
        mine = 0 if self.task.void else self.task.weight(batch)
        if self.task.ranks == 1:
            return mine
        return int(self.trainer.strategy.reduce(torch.tensor(mine, device=self.device), reduce_op="sum"))

    def score(self, metrics, logits: Tensor | None, batch) -> None:
        if logits is not None and len(metrics):
            labels = labels_of(batch)
            if not self.task.void:
                metrics.update(logits, labels, **parts_of(batch))
            for name, metric in metrics.items(keep_base=False):
                bar = name.endswith(f"/{self.task.metric}")
                self.log(name, metric, prog_bar=bar, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self):
        head = {id(p) for p in h.parameters()} if (h := roles.head(self.model)) is not None else set()
        groups: dict[tuple[bool, bool], list] = {}
        for p in self.model.parameters():
            if p.requires_grad:
                groups.setdefault((id(p) in head, p.ndim > 1), []).append(p)
        optimizer = OPTIMIZERS[self.optimizer](
            [
                {
                    "params": parameters,
                    "lr": self.lr_head if of_head else self.lr,
                    "weight_decay": self.weight_decay if matrix else 0.0,
                }
                for (of_head, matrix), parameters in groups.items()
            ]
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warm = max(1, round(self.warmup * steps))

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            left = max(0.0, (steps - step) / max(1, steps - warm))
            return {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}[self.schedule]

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def unwrapped(name: str) -> str:
    """A parameter's name without what FSDP puts around blocks."""
    return name.replace("_fsdp_wrapped_module.", "")


class KeepBest(Callback):
    """Keeps the weights that validation likes best, in memory and as a checkpoint, and puts them back at the end.

    Without validation data the last ones are kept.
    """

    def __init__(self, monitor: str, mode: str, path):
        self.monitor, self.sign, self.path = monitor, 1 if mode == "max" else -1, path
        self.best, self.epoch, self.weights = -math.inf, None, None
        self.inherited = False  # the weights are an earlier process's, and the file may be of an epoch that it lost

    def on_train_start(self, trainer, lit) -> None:
        if self.inherited:
            lit.last_good = str(self.path)

    def on_validation_end(self, trainer, lit) -> None:
        if trainer.sanity_checking or self.monitor not in trainer.callback_metrics or not lit.settled:
            return
        value = self.sign * trainer.callback_metrics[self.monitor].item()
        if value > self.best:
            self.best, self.epoch = value, trainer.current_epoch
            self.keep(trainer, lit)

    def keep(self, trainer, lit) -> None:
        self.inherited = False
        trained = {unwrapped(n): p for n, p in lit.model.named_parameters() if p.requires_grad}
        if isinstance(trainer.strategy, FSDPStrategy):  # puts shards together, for the first rank; `put` writes
            whole = trainer.strategy.lightning_module_state_dict()
            self.weights = {n: whole[f"model.{n}"] for n in trained if f"model.{n}" in whole}
            return
        self.weights = {n: p.detach().cpu().clone() for n, p in trained.items()}
        if trainer.is_global_zero:
            checkpoint.save(lit.model, self.path)
        lit.last_good = str(self.path)

    def on_fit_end(self, trainer, lit) -> None:
        if self.weights is None:
            self.epoch, self.best = trainer.current_epoch - 1, math.nan
            self.keep(trainer, lit)
        if not isinstance(trainer.strategy, FSDPStrategy):
            self.put(lit.model)
            if self.inherited and trainer.is_global_zero:
                checkpoint.save(lit.model, self.path)

    def put(self, model: nn.Module) -> None:
        """The kept weights into the model, or into one like it."""
        here = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.weights.items():
                here[name].copy_(value)

    def state_dict(self) -> dict:
        return {"best": self.best, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.epoch, self.weights = state["best"], state["epoch"], state["weights"]
        self.inherited = self.weights is not None

    @property
    def value(self) -> float:
        return self.sign * self.best
