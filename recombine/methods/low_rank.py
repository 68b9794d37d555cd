"""W + left right, with left = 0 at the start: the low-rank updates of WeCoLoRA and PC-LoRA."""

import math

from torch import nn

from recombine.layers import DeltaLinear


def low_rank(linear: nn.Linear, rank: int) -> DeltaLinear:
    """The layer with the weight W + left right, whose left (m, k) and right (k, n) train.

    left starts at 0, so the output is the same. right is Kaiming uniform, as in LoRA. k is `rank`, at most min(m, n).
    """
    m, n = linear.weight.shape
    left = linear.weight.new_zeros(m, min(rank, m, n))
    right = linear.weight.new_empty(left.shape[1], n)
    nn.init.kaiming_uniform_(right, a=math.sqrt(5))
    layer = DeltaLinear(linear.weight, left, right, bias=linear.bias)
    layer.left.requires_grad_(True)
    layer.right.requires_grad_(True)
    return layer


def last_layers(model: nn.Module) -> dict[str, DeltaLinear]:
    """The layers with a delta that the last method put in, by module name."""
    layers = {name: model.get_submodule(name) for name in model.recombined.targets}
    rewritten = model.recombined.steps[-1].layers
    return {name: layer for name, layer in layers.items() if name in rewritten and isinstance(layer, DeltaLinear)}
