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

from recombine.data.metrics import collection

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
        return collection(("acc", "balanced_acc"), self.num_classes)


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


class Denoising(Objective):
    """The squared error of the noise, or the velocity, with prior preservation (DreamBooth, arXiv 2208.12242, Eq. 2).

    loss = mean over the pictures to be learnt + prior * mean over those that the model drew before. A model is judged
    by the error over the pictures to be learnt alone.
    """

    def __init__(self, prior: float = 1.0):
        super().__init__()
        self.prior = prior

    def loss(self, model: nn.Module, batch, shard: Shard = WHOLE) -> tuple[Tensor, None]:
        said = model(**inputs_of(batch))
        errors = (said.logits.float() - said.target.float()).square().flatten(1).mean(1)  # (B,)
        learnt = labels_of(batch).bool()
        kinds = [(1.0, learnt), (self.prior, ~learnt)]
        shares = shard.factors([rows.sum() for _, rows in kinds])
        means = [errors.where(rows, 0.0).sum() / rows.sum().clamp(min=1) for _, rows in kinds]
        return sum(weight * share * mean for (weight, _), share, mean in zip(kinds, shares, means, strict=True)), None

    def weight(self, batch) -> int:
        return int(labels_of(batch).sum())


def build(data, label_smoothing: float = 0.0) -> Objective:
    """The objective of a data module, scored by the module's own metrics where it has some."""
    objective = {
        "classification": lambda: Classification(data.num_classes, label_smoothing),
        "regression": Regression,
        "lm": LanguageModel,
        "denoising": lambda: Denoising(getattr(data, "prior_weight", 1.0)),
    }[data.objective]()
    if data.metrics() is not None:
        objective.metrics = data.metrics
        objective.metric, objective.mode = data.metric, "max"
    return objective
