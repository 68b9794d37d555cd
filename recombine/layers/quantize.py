"""Post-training quantisation of stored weights: symmetric integers, one scale a row, the largest magnitude at the end
of the range (arXiv 2004.09602, Sec. 3; what CRISP Fig. 4 puts on top of its factors)."""

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def quantize(layers: Iterable[nn.Module], bits: int) -> None:
    """Rounds the matrices of these layers, in place, to integers of that many bits times a float32 scale a row.

    A basis that layers share is rounded once. Vectors (biases) stay. The values are computed with in float; what they
    would take as integers, and their scales, is noted at each parameter as `stored_bytes`, which `budget.count` reads.
    """
    for weight in {id(p): p for layer in layers for p in layer.parameters() if p.ndim > 1}.values():
        rows = weight.reshape(len(weight), -1)
        scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / (2 ** (bits - 1) - 1)
        weight.copy_((torch.round(rows / scale) * scale).view_as(weight))
        weight.stored_bytes = -(-weight.numel() * bits // 8) + 4 * len(rows)
