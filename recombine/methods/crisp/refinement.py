"""CRISP Alg. 5, Stage 2: a short gradient descent on bases and mixers, on the weights and on calibration batches.

Each step descends weight * sum_i |W_i - W'_i|^2 / |W_i|^2 / L + task * (loss of one batch), for L layers. Norms,
biases and everything else stay as they are.

Paper: sum_i |W_i - W'_i|^2 as it is (`relative=false`). Its weights, rate and steps are not given. Here: relative
errors, so that the same weights suit any model.
"""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from recombine.core.calibration import Losses, passes
from recombine.errors import UsageError
from recombine.layers import SharedBasisLinear
from recombine.runtime.kinds import Rate, Steps, Weight


@dataclass
class Refine:
    """Fields of `method.refine`: how the refinement is run.

    Args:
        steps: of Adam; 0: no refinement.
        lr: learning rate.
        weight: factor of the weights' error.
        task: factor of the task's loss.
        relative: each layer's error of the weights is divided by |W_i|^2 and by the number of layers.
    """

    steps: Steps = 0
    lr: Rate = 1e-3
    weight: Weight = 1.0
    task: Weight = 1.0
    relative: bool = True

    def check(self) -> None:
        """Refuses with a UsageError for a negative number."""
        for name in ("steps", "lr", "weight", "task"):
            if (value := getattr(self, name)) < 0:
                raise UsageError(f"method.refine.{name}={value}: must not be negative")


@torch.enable_grad()
def refine(original: list[tuple[SharedBasisLinear, Tensor]], losses: Losses, how: Refine) -> None:
    """Trains the layers' bases and mixers, in place, towards the original weights and the task.

    Args:
        original: (layer, its original weight (m, n)) for all rewritten layers.
        losses: yields the task's loss for one calibration batch after another.

    Raises:
        UsageError: a pass over the calibration data had no batch.
    """
    parameters = {id(p): p for layer, _ in original for p in (layer.basis, layer.mixer)}.values()  # a basis once
    flags = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=how.lr)
    for loss in islice(passes(losses), how.steps):
        optimizer.zero_grad()
        (how.task * loss).backward()
        for layer, weight in original:  # one by one: no two dense gradients at a time
            share = 1 / (len(original) * weight.square().sum().clamp(min=1e-30)) if how.relative else 1.0
            (how.weight * share * (layer.dense_weight() - weight).square().sum()).backward()
        optimizer.step()
    for p, flag in zip(parameters, flags, strict=True):
        p.requires_grad_(flag)
        p.grad = None
