"""Post-training quantisation of stored weights to symmetric integers (arXiv 2004.09602, Sec. 3; CRISP Fig. 4).

Every row has one scale, which puts its largest magnitude at the end of the integers' range.
"""

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def quantize(layers: Iterable[nn.Module], bits: int) -> None:
    """Rounds the matrices of these layers to integers times one float32 scale for each row.

    The parameters stay the same objects. A basis that layers share is rounded once. Vectors (biases) stay. The layers
    still compute in float. The bytes that the integers and scales would take are noted on each parameter as
    `stored_bytes`, which `account.count` reads.

    Args:
        bits: of an integer, its sign included.
    """
    for weight in {id(p): p for layer in layers for p in layer.parameters() if p.ndim > 1}.values():
        rows = weight.reshape(len(weight), -1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # half is too coarse for them
        scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny) / (2 ** (bits - 1) - 1)
        weight.data = (
            (torch.round(rows / scale) * scale).to(weight).view_as(weight)
        )  # who has the old values keeps them
        weight.stored_bytes = -(-weight.numel() * bits // 8) + 4 * len(rows)
