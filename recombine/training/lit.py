"""LitRecombine, the only LightningModule: a model, the method that made it, and an objective."""

import sys
from functools import cached_property

import lightning as L
import torch
from torch import Tensor, nn

from recombine.core.method import Method
from recombine.data.batch_sampler import seed_of
from recombine.errors import UsageError
from recombine.training import distributed, finite, resume
from recombine.training.groups import Rates, grouped, optimizer_groups, peak_rate, peak_rates
from recombine.training.objectives import Classification, Objective, Shard, labels_of, parts_of
from recombine.training.optimizers import OPTIMIZERS, fusible, prepare, scale_gradients
from recombine.training.rates import SCHEDULES, scheduled
from recombine.training.settings import OptimizerSettings
from recombine.training.sharding import Sharded, local, shard, whole


class LitRecombine(L.LightningModule):
    """Trains whatever requires a gradient.

    Args:
        optim: the optimizer and its schedule; without a rate of its own the method's is used.
        seed: of what is drawn in training (dropout), anew at every step, so that a run can go on after any of them.
        key: where `optim` stands in the configuration, and slot: where the method does; errors name their keys.

    Raises:
        UsageError: an unknown optimizer or schedule; in training, a loss that is not finite.
    """

    strict_loading = False  # a training state holds what trains, not the backbone

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        objective: Objective,
        optim: OptimizerSettings | None = None,
        seed: int = 0,
        key: str = "optim",
        slot: str = "method",
    ):
        super().__init__()
        self.model, self.method, self.objective, self.seed = model, method, objective, seed
        self.optim, self.key = optim or OptimizerSettings(), key
        self.lr, self.relative, self.lr_key = peak_rate(method, self.optim, key, slot)
        if self.optim.name not in OPTIMIZERS:
            raise UsageError(f"{key}.name={self.optim.name}: must be one of {', '.join(OPTIMIZERS)}")
        if self.optim.schedule not in SCHEDULES:
            raise UsageError(f"{key}.schedule={self.optim.schedule!r}: must be {', '.join(SCHEDULES)}")
        prepare(self.optim.name)
        self.train_metrics = objective.metrics().clone("train/")
        self.val_metrics = objective.metrics().clone("val/")
        self.test_metrics = objective.metrics().clone("test/")
        self.train_metrics.persistent(True)  # an epoch may be taken up in its middle
        self.last_good: str | None = None  # the checkpoint a user can go back to
        self.is_final_form = True  # the model has the form that it will be kept in
        self.right: list[Tensor] = []  # of each test batch, which of this rank's samples are told right
        self.first, self.total = 0, 0.0  # of the batches that make one step: the first's weight, and all in units of it

    def forward(self, x: Tensor) -> Tensor:
        """The model's output."""
        return self.model(x)

    @cached_property
    def rates(self) -> Rates:
        """The peak rates of a training."""
        return peak_rates(self.model, self.method, self.optim, self.lr, self.relative)

    def configure_model(self) -> None:
        """Divides the model among the ranks, where it is to be trained in shards."""
        if self.trainer.state.fn == "fit":
            _ = self.rates  # told from whole weights
        if isinstance(self.trainer.strategy, Sharded) and self.trainer.state.fn == "fit":
            shard(self.model, self.trainer.strategy.device_mesh["data_parallel"])

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Leaves the frozen weights out of a training state, and puts every rank's part of the metrics into it."""
        keep = {f"model.{name}" for name, p in self.model.named_parameters() if p.requires_grad}
        keep |= {f"model.{name}" for name, _ in self.model.named_buffers()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in keep}
        checkpoint["train_metrics"] = distributed.gather(self.train_metrics.state_dict())

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Goes on with the metrics of an epoch that is taken up in its middle. At its start it has none yet.

        On another number of ranks than before, the first one goes on with those of all.
        """
        state, name = checkpoint["state_dict"], "train_metrics."
        old = {k.removeprefix(name): state.pop(k) for k in list(state) if k.startswith(name)}  # of earlier versions
        parts = checkpoint.get("train_metrics", [old])
        if resume.position(checkpoint)[1] == 0:
            return
        if len(parts) == distributed.count():
            self.train_metrics.load_state_dict(parts[distributed.rank()])
        elif distributed.rank() == 0:
            self.train_metrics.load_state_dict(parts[0])
            for part in parts[1:]:
                (other := self.train_metrics.clone()).load_state_dict(part)
                for name, metric in self.train_metrics.items(keep_base=False):
                    if metric.full_state_update:  # Pearson's r, which cannot be put together
                        print(f"{name} of this epoch begins anew: ranks were {len(parts)}", file=sys.stderr)
                        metric.reset()
                    else:
                        metric.merge_state(other[name.removeprefix("train/")])

    def on_train_batch_start(self, batch, index):
        """Seeds the step's random draws and lets the method move its schedule."""
        nth = index % self.trainer.accumulate_grad_batches  # of the batches that make one step
        where = (self.global_step, self.global_rank, *filter(None, [nth]))
        torch.manual_seed(seed_of(self.seed, type(self.objective).__name__, *where))
        if self.objective.schedules_method and not nth:
            share = self.global_step / max(1, self.trainer.estimated_stepping_batches - 1)
            self.is_final_form = self.method.on_distillation_step(self.model, min(1.0, share))

    def training_step(self, batch, index):
        """The loss of a batch, the method's penalty included."""
        shard = self.shard(self.trainer.train_dataloader, index)
        loss, logits = self.objective.loss(self.model, batch, shard)
        loss = loss + whole(self.method.penalty(self.model))
        if not torch.isfinite(loss):
            raise self.failure(f"loss={loss.item()}", batch)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self.score(self.train_metrics, logits, batch, shard)
        return loss if self.trainer.accumulate_grad_batches == 1 else self.part(loss, self.weight(batch, shard))

    def part(self, loss: Tensor, weight: int) -> dict[str, Tensor]:
        """What one of the batches adds that make a step: its loss by its weight, in units of the first's."""
        self.first = self.first or max(weight, 1)
        self.total += weight / self.first
        return {"loss": loss * (weight / self.first), "mean": loss.detach()}

    def on_before_optimizer_step(self, optimizer):
        """Makes the gradient of several batches that of one batch of all their samples or tokens."""
        if self.total:
            scale_gradients(optimizer, self.trainer.accumulate_grad_batches / self.total)
        self.first, self.total = 0, 0.0

    def refuse_divergence(self, scores: dict[str, Tensor]) -> None:
        """Looks at the weights that train, and at the validation's loss where there is one. Every rank has to call it.

        Raises:
            UsageError: one of them is not finite, or a weight as good as that.
        """
        loss = scores.get("val/loss")
        trained = ((name, local(p)) for name, p in self.model.named_parameters() if p.requires_grad)
        bad = finite.tensors_not_finite(trained, finite.LIMIT)
        if distributed.all_reduce_max(len(bad), self.device):  # of shards each rank sees its own
            raise self.failure(finite.described(bad or ["another rank's"], f"beyond {finite.LIMIT:g} or not finite"))
        if loss is not None and not torch.isfinite(loss):
            raise self.failure(f"val/loss={loss.item()}")

    def failure(self, what: str, batch=None) -> UsageError:
        """The error that ends a training or a test, in which `what` is wrong."""
        where, started = "in the test", self.last_good is not None
        if self.trainer.state.fn == "fit":
            where, started = f"at step {self.global_step} (epoch {self.current_epoch})", self.global_step > 0
        if why := finite.blame(self.model, batch, started=started, precision=self.trainer.precision):
            return UsageError(f"{what} {where}: {why}")
        return UsageError(f"{what} {where}: {self.advice()}; {self.way_back()}")

    def advice(self) -> str:
        """What may end a divergence: smaller rates than those that trained, the largest first."""
        rates = {
            f"{self.key}.lr_head" if kind.head else self.lr_key: self.optim.lr_head if kind.head else self.lr
            for kind in grouped(self.model, self.rates)
        }
        if self.optim.weight_decay * max(rates.values()) >= 1:  # a step takes more than all of a weight
            rates = {f"{self.key}.weight_decay": self.optim.weight_decay}
        smaller = [f"{key} than {rates[key]:g}" for key in sorted(rates, key=rates.get, reverse=True)]
        return f"training diverged, try a smaller {' or a smaller '.join(smaller)}"

    def way_back(self) -> str:
        """Which checkpoint is left."""
        return f"the last good checkpoint is {self.last_good}" if self.last_good else "no checkpoint was kept yet"

    def validation_step(self, batch, index):
        """Logs val/loss and adds a batch to the validation metrics."""
        shard = self.shard(self.trainer.val_dataloaders, index)
        loss, logits = self.objective.loss(self.model, batch, shard)
        self.log("val/loss", loss, prog_bar=True, batch_size=self.weight(batch, shard), sync_dist=True)
        self.score(self.val_metrics, logits, batch, shard)

    def test_step(self, batch, index):
        """Logs test/loss and adds a batch to the test metrics."""
        shard = self.shard(self.trainer.test_dataloaders, index)
        loss, logits = self.objective.loss(self.model, batch, shard)
        self.log("test/loss", loss, batch_size=self.weight(batch, shard), sync_dist=True)
        self.score(self.test_metrics, logits, batch, shard)
        if isinstance(self.objective, Classification):
            right = logits.argmax(-1) == labels_of(batch)
            self.right.append(right[:0] if shard.empty else right)

    def shard(self, loader, index: int) -> Shard:
        """What this rank has of the loader's batch with that index."""
        ranks = self.trainer.world_size
        return Shard(ranks, ranks > 1 and loader.batch_sampler.empty_shard(index))

    def weight(self, batch, shard: Shard) -> int:
        """How much the whole batch, all ranks' parts together, counts in the loss of its split."""
        mine = 0 if shard.empty else self.objective.weight(batch)
        if shard.ranks == 1:
            return mine
        return int(self.trainer.strategy.reduce(torch.tensor(mine, device=self.device), reduce_op="sum"))

    def score(self, metrics, logits: Tensor | None, batch, shard: Shard) -> None:
        """Adds a batch to the metrics of its split, and has them logged at the epoch's end."""
        if logits is not None and len(metrics):
            labels = labels_of(batch)
            if not shard.empty:
                metrics.update(logits, labels, **parts_of(batch))
            for name, metric in metrics.items(keep_base=False):
                bar = name.endswith(f"/{self.objective.metric}")
                self.log(name, metric, prog_bar=bar, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self):
        """The optimizer and its schedule, for Lightning."""
        groups = optimizer_groups(self.model, self.rates, self.key)
        optimizer = OPTIMIZERS[self.optim.name](groups, fused=fusible(self.device, self.trainer.precision))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, scheduled(self.optim, int(self.trainer.estimated_stepping_batches))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
