"""CRISP Alg. 5, Stage 2: a short gradient descent on bases and mixers, on the weights and on calibration batches.

Each step: weight * sum_i |W_i - W'_i|^2 / |W_i|^2 / L + task * loss of one batch, L layers. Norms, biases and all else
stay. Paper: sum |W - W'|^2 as it is (`relative=false`); weights, rate and steps not given. Here: relative, so that they
suit any model.
"""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from recombine.core.calibration import Losses, passes
from recombine.errors import UsageError
from recombine.layers import SharedBasisLinear


@dataclass
class Refine:
    """steps of Adam at rate lr (0: none); weight and task weigh the two errors. relative: each layer's error of the
    weights is divided by |W_i|^2 and by L."""

    steps: int = 0
    lr: float = 1e-3
    weight: float = 1.0
    task: float = 1.0
    relative: bool = True

    def check(self) -> None:
        for name in ("steps", "lr", "weight", "task"):
            if (value := getattr(self, name)) < 0:
                raise UsageError(f"method.refine.{name}={value}: must not be negative")


@torch.enable_grad()
def refine(original: list[tuple[SharedBasisLinear, Tensor]], losses: Losses, how: Refine) -> None:
    """Trains the layers' bases and mixers in place towards the original weights (m, n) and the task."""
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
