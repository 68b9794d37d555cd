"""What a model is trained and judged by: a loss and its metrics.

A batch is (images, labels), or a dict of input_ids, attention_mask and labels, and perhaps ``part`` (B,): which of a
test set's parts a row is of, for metrics that tell them apart.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from recombine.errors import UsageError
from recombine.models import roles

NOT_INPUTS = ("labels", "part")


def call(model: nn.Module, batch) -> Tensor:
    """The model's logits for a batch."""
    if isinstance(batch, dict):
        return model(**inputs_of(batch)).logits
    logits = model(inputs_of(batch))
    return logits if isinstance(logits, Tensor) else logits.logits  # of transformers


def inputs_of(batch):
    """A batch without its labels: images, or a dict of the model's keyword arguments."""
    return {k: v for k, v in batch.items() if k not in NOT_INPUTS} if isinstance(batch, dict) else batch[0]


def labels_of(batch) -> Tensor:
    """The labels of a batch: (B,) classes or numbers, or (B, T) tokens."""
    return batch["labels"] if isinstance(batch, dict) else batch[1]


def parts_of(batch) -> dict[str, Tensor]:
    """What a metric may know of a batch beside logits and labels."""
    return {"part": batch["part"]} if isinstance(batch, dict) and "part" in batch else {}


def fetch(data, dataset, indices: list[int], device: torch.device):
    """The batch of these samples of a data module's split, as a model takes it, on the device."""
    return on_device(data, dataset.__getitems__(indices), device)


def on_device(data, batch, device: torch.device):
    """A batch of a data module's loaders, as a model takes it, on the device."""
    return data.on_after_batch_transfer(move_data_to_device(batch, device), 0)


class Shard(NamedTuple):
    """What this rank has of a batch.

    ranks: how many share the batch. empty: no row was left for this rank, so it repeats one that counts for nothing.
    """

    ranks: int = 1
    empty: bool = False

    def factors(self, counts: list) -> list:
        """Factors for this rank's means, so that their average over the ranks is the mean over the whole batch.

        counts: over how many terms this rank takes each mean.
        """
        if self.ranks == 1:
            return [1.0] * len(counts)
        device = next((c.device for c in counts if isinstance(c, Tensor)), None)
        mine = torch.stack([torch.as_tensor(c, dtype=torch.float32, device=device) for c in counts]) * (not self.empty)
        dist.all_reduce(total := mine.clone())
        return (mine * self.ranks / total.clamp(min=1e-12)).unbind()


WHOLE = Shard()


class Objective(nn.Module):
    """What a training minimises, and what it is scored by."""

    metric, mode = "loss", "min"  # what validation chooses the weights by
    schedules_method = False  # lets the method move its schedule before each step

    def loss(self, model: nn.Module, batch, shard: Shard = WHOLE) -> tuple[Tensor, Tensor | None]:
        """The loss (scalar), of which the mean over the ranks is that of the whole batch; and logits or None."""
        raise NotImplementedError

    def metrics(self) -> MetricCollection:
        """The metrics, which take logits and labels."""
        return MetricCollection({})

    def weight(self, batch) -> int:
        """How much a batch's loss counts in the loss of its split."""
        return len(labels_of(batch))

    def report(self, scores: dict[str, float]) -> dict[str, float]:
        """What a result says of a split, from its loss and metrics."""
        return scores


class Classification(Objective):
    """Cross-entropy; accuracy over samples and, where classes are uneven, the mean over classes."""

    metric, mode = "acc", "max"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0):
        super().__init__()
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    def loss(self, model: nn.Module, batch, shard: Shard = WHOLE) -> tuple[Tensor, Tensor]:
        logits = call(model, batch)  # (B, classes)
        smoothing = self.label_smoothing if model.training else 0.0
        (share,) = shard.factors([logits.new_tensor(len(logits))])
        return share * F.cross_entropy(logits.float(), labels_of(batch), label_smoothing=smoothing), logits

    def metrics(self) -> MetricCollection:
        return MetricCollection(
            {
                "acc": MulticlassAccuracy(self.num_classes, average="micro"),
                "balanced_acc": MulticlassAccuracy(self.num_classes, average="macro"),
            }
        )


class Regression(Objective):
    """Mean squared error of the one output, as transformers trains STS-B."""

    def loss(self, model: nn.Module, batch, shard: Shard = WHOLE) -> tuple[Tensor, Tensor]:
        values = call(model, batch).squeeze(-1).float()  # (B,)
        (share,) = shard.factors([values.new_tensor(len(values))])
        return share * F.mse_loss(values, labels_of(batch).float()), values


class LanguageModel(Objective):
    """Cross-entropy of the next token; labels (B, T) as the inputs, -100 where none is wanted. Its exp: perplexity.

    A split's loss is the mean over its tokens, however they fall into batches.
    """

    def loss(self, model: nn.Module, batch, shard: Shard = WHOLE) -> tuple[Tensor, None]:
        logits, labels = call(model, batch)[:, :-1], labels_of(batch)[:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
        (share,) = shard.factors([total.new_tensor(self.weight(batch))])
        return share * total / max(self.weight(batch), 1), None

    def weight(self, batch) -> int:
        return int((labels_of(batch)[:, 1:] != -100).sum())

    def report(self, scores: dict[str, float]) -> dict[str, float]:
        return scores | {"ppl": math.exp(min(scores["loss"], 700.0))}


def build(data, label_smoothing: float = 0.0) -> Objective:
    """The objective of a data module, scored by the module's own metrics where it has some."""
    objective = {
        "classification": lambda: Classification(data.num_classes, label_smoothing),
        "regression": Regression,
        "lm": LanguageModel,
    }[data.objective]()
    if data.metrics() is not None:
        objective.metrics = data.metrics
        objective.metric, objective.mode = data.metric, "max"
    return objective


class Distillation(Objective):
    """The student follows the original model (CRISP Alg. 4): KL and MSE of the logits, MSE of every block's output.

    loss = kl KL(teacher || student) + mse |logits|^2 + features mean_l |block_l|^2 + l1 |last block|_1, each MSE
    relative to the teacher's mean square, so that deep layers and large logits do not drown the rest. Labels are not
    used, padding is left out. A student that lost blocks is compared with the blocks it kept; one whose width changed,
    by its logits alone. With l1 alone it is WeCoLoRA's loss: the mean absolute error of the last block's output.
    Paper: prints KL(student || teacher) and gives no weights. Here: the usual direction, T = 1, all weights 1.
    Paper: plain squared errors, summed over the blocks. Here: relative ones, and their mean over the blocks.
    Paper: the teacher is the CRISP model at its exact size. Here: the original model, whose weights are the same.
    """

    schedules_method = True

    def __init__(self, teacher: nn.Module, kl: float = 1.0, mse: float = 1.0, features: float = 1.0, l1: float = 0.0):
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.kl, self.mse, self.features, self.l1 = kl, mse, features, l1

    def loss(self, model: nn.Module, batch, shard: Shard = WHOLE) -> tuple[Tensor, None]:
        with torch.no_grad():
            target, target_blocks = outputs(self.teacher, batch)
        logits, blocks = outputs(model, batch)
        kept, last = model.recombined.blocks, target_blocks[-1]
        if kept is not None:
            target_blocks = [target_blocks[i] for i in kept]
        classes, rows = logits.shape[-1], logits[..., 0].numel()
        energies = [1 if shard.ranks == 1 else x.float().square().sum() for x in (target, *target_blocks)]
        share, of_last, of_logits, *of_blocks = shard.factors([rows, blocks[-1].numel(), *energies])
        divergence = F.kl_div(
            logits.reshape(-1, classes).log_softmax(-1),
            target.reshape(-1, classes).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        loss = self.kl * share * divergence
        loss = loss + self.mse * of_logits * relative_mse(logits, target)
        if self.features and blocks[0].shape == target_blocks[0].shape:
            errors = (share * relative_mse(b, t) for share, b, t in zip(of_blocks, blocks, target_blocks, strict=True))
            loss = loss + self.features * sum(errors) / len(blocks)
        if self.l1:
            if blocks[-1].shape != last.shape:
                raise UsageError(f"stage.distil.l1={self.l1:g}: the last block's width has changed; leave it at 0")
            loss = loss + self.l1 * of_last * (blocks[-1].float() - last.float()).abs().mean()
        return loss, None

    def weight(self, batch) -> int:
        """Where the logits are of tokens, so is the loss."""
        return int(batch["attention_mask"].sum()) if labels_of(batch).ndim == 2 else len(labels_of(batch))

    def train(self, mode: bool = True):
        return super().train(False)  # the teacher never leaves eval mode


def outputs(model: nn.Module, batch) -> tuple[Tensor, list[Tensor]]:
    """(logits, outputs of the blocks in order). Of texts they have a row for each non-padding token: (tokens, d)."""
    blocks: list[Tensor] = []
    keep = batch["attention_mask"].bool() if isinstance(batch, dict) else None

    def real(x: Tensor) -> Tensor:
        return x[keep] if keep is not None and x.ndim == 3 and x.shape[:2] == keep.shape else x

    def catch(_, __, y):
        blocks.append(real(y[0] if isinstance(y, tuple) else y))

    hooks = [block.register_forward_hook(catch) for block in roles.blocks(model)]
    try:
        return real(call(model, batch).float()), blocks
    finally:
        for hook in hooks:
            hook.remove()


def relative_mse(x: Tensor, target: Tensor) -> Tensor:
    """The mean squared error over the target's mean square."""
    return (x.float() - target.float()).square().mean() / target.float().square().mean().clamp(min=1e-12)
