"""What a model is trained and judged by: a loss and its metrics."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from recombine.models import roles


class Task(nn.Module):
    """loss(model, batch) -> (scalar loss, logits or None); metrics() -> what logits and labels are scored with."""

    monitor = "val/acc"  # what validation chooses the weights by
    mode = "max"

    def loss(self, model: nn.Module, batch) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def metrics(self) -> MetricCollection:
        return MetricCollection({})


class Classification(Task):
    """Cross-entropy; accuracy over images and, where classes are uneven, the mean over classes."""

    def __init__(self, num_classes: int, label_smoothing: float = 0.0):
        super().__init__()
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    def loss(self, model: nn.Module, batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = model(images)  # (B, classes)
        smoothing = self.label_smoothing if model.training else 0.0
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), logits

    def metrics(self) -> MetricCollection:
        return MetricCollection(
            {
                "acc": MulticlassAccuracy(self.num_classes, average="micro"),
                "balanced_acc": MulticlassAccuracy(self.num_classes, average="macro"),
            }
        )


class Distillation(Task):
    """The student follows the original model (CRISP Alg. 4): KL and MSE of the logits, MSE of every block's output.

    loss = kl KL(teacher || student) + mse |logits|^2 + features mean_l |block_l|^2, each MSE relative to the teacher's
    mean square, so that deep layers and large logits do not drown the rest. Labels are not used.
    Paper: prints KL(student || teacher) and gives no weights. Here: the usual direction, T = 1, all weights 1.
    """

    monitor, mode = "val/loss", "min"

    def __init__(self, teacher: nn.Module, kl: float = 1.0, mse: float = 1.0, features: float = 1.0):
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.kl, self.mse, self.features = kl, mse, features

    def loss(self, model: nn.Module, batch) -> tuple[Tensor, None]:
        images, _ = batch
        with torch.no_grad():
            target, target_blocks = outputs(self.teacher, images)
        logits, blocks = outputs(model, images)
        loss = self.kl * F.kl_div(
            logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True
        )
        loss = loss + self.mse * relative_mse(logits, target)
        if self.features:
            pairs = zip(blocks, target_blocks, strict=True)
            loss = loss + self.features * sum(relative_mse(b, t) for b, t in pairs) / len(blocks)
        return loss, None

    def train(self, mode: bool = True):
        return super().train(False)  # the teacher never leaves eval mode


def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(logits (B, classes), the output of every block in order)."""
    blocks: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *a: blocks.append(a[-1])) for block in roles.blocks(model)]
    try:
        return model(images).float(), blocks
    finally:
        for hook in hooks:
            hook.remove()


def relative_mse(x: Tensor, target: Tensor) -> Tensor:
    return (x.float() - target.float()).square().mean() / target.float().square().mean().clamp(min=1e-12)
