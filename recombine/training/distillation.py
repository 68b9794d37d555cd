"""The objective of a distillation: the student follows the original model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine.errors import UsageError
from recombine.models import roles
from recombine.training.objectives import WHOLE, Objective, Shard, call, labels_of


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
        loss = self.mse * of_logits * relative_mse(logits, target)
        if self.kl and logits.ndim < 4:  # a drawing's have no classes
            divergence = F.kl_div(
                logits.reshape(-1, classes).log_softmax(-1),
                target.reshape(-1, classes).log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            )
            loss = loss + self.kl * share * divergence
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
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    keep = None if mask is None else mask.bool()

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
