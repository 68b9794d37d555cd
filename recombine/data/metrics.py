"""What classes and values are scored by, of logits (B, classes) or values (B,) and labels (B,); GLUE's among them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef


class Balanced(MulticlassAccuracy):
    """The mean over the classes that occur among the labels; others have no accuracy."""

    def compute(self) -> Tensor:
        support = self.tp + self.fn
        return (self.tp / support.clamp(min=1)).sum() / (support > 0).sum()


class PositiveF1(BinaryF1Score):
    """F1 of class 1 from the logits of two classes."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        super().update(logits.argmax(-1), labels)


class PartAccuracy(Metric):
    """Accuracy on one part of a test set, or the mean over the parts that there are. A set without parts is part 0.

    Args:
        which: the part; None: the mean.
    """

    full_state_update = False

    def __init__(self, which: int | None = None, parts: int = 2):
        super().__init__()
        self.which = which
        self.add_state("right", torch.zeros(parts, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros(parts, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, part: Tensor | None = None) -> None:
        part = torch.zeros_like(labels) if part is None else part  # (B,)
        self.rows += torch.bincount(part, minlength=len(self.rows))
        self.right += torch.bincount(part[logits.argmax(-1) == labels], minlength=len(self.rows))

    def compute(self) -> Tensor:
        """nan of a part without rows."""
        share = self.right / self.rows
        return share[self.rows > 0].mean() if self.which is None else share[self.which]


METRICS = {  # name -> metric of logits (B, classes), or of values (B,), and labels
    "acc": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "acc_m": lambda classes: PartAccuracy(0),
    "acc_mm": lambda classes: PartAccuracy(1),
    "m+mm": lambda classes: PartAccuracy(),
    "balanced_acc": lambda classes: Balanced(classes, average="none"),
    "mcc": lambda classes: MulticlassMatthewsCorrCoef(classes),
    "f1": lambda classes: PositiveF1(),
    "pearson": lambda classes: PearsonCorrCoef(),
    "spearman": lambda classes: SpearmanCorrCoef(),
}


def collection(names: Sequence[str], classes: int) -> MetricCollection:
    """New metrics of these names (of METRICS) for so many classes."""
    with warnings.catch_warnings(action="ignore"):  # Spearman's keeps all values, as it must
        return MetricCollection({name: METRICS[name](classes) for name in names})
