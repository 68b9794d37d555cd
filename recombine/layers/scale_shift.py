"""y = gamma * Op(x) + beta: an adapter of what a layer computes (SSF), whatever the layer is."""

import torch
from torch import Tensor, nn

from recombine.layers.base import RecombinedLinear


class ScaleShift(nn.Module):
    """gamma and beta (C,), over the C channels that a layer ends in; they start at 1 and 0, where nothing changes.

    The layer: an nn.Linear, RecombinedLinear, nn.Conv2d or a norm with a weight. One that knows no bias (an RMSNorm)
    is only scaled, beta is None: there would be no place to merge a shift into.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base_layer = layer
        weight = layer.weight.detach()  # (C, ...)
        self.out_features, self.in_features = len(weight), weight[0].numel()
        self.gamma = nn.Parameter(weight.new_ones(len(weight)))
        self.register_parameter("beta", nn.Parameter(weight.new_zeros(len(weight))) if hasattr(layer, "bias") else None)
        self.channels = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x) * self.gamma.view(self.channels)
        return y if self.beta is None else y + self.beta.view(self.channels)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer itself, scaled and shifted; one without a bias gets one."""
        layer = self.base_layer.merged() if isinstance(self.base_layer, RecombinedLinear) else self.base_layer
        layer.weight = nn.Parameter(self.gamma.view(-1, *[1] * (layer.weight.ndim - 1)) * layer.weight)
        if self.beta is not None:
            layer.bias = nn.Parameter(self.beta if layer.bias is None else self.gamma * layer.bias + self.beta)
        return layer
