"""y = gamma * Op(x) + beta: the adapter of SSF, which scales and shifts the output of any layer."""

import torch
from torch import Tensor, nn


class ScaleShift(nn.Module):
    """A layer whose C output channels are scaled by gamma (C,) and shifted by beta (C,).

    gamma starts at 1 and beta at 0, where nothing changes. Both train. beta is None for a layer without a bias
    attribute (an RMSNorm): a shift could not be merged into it.

    Args:
        layer: an nn.Linear, a RecombinedLinear, an nn.Conv2d or a norm with a weight.
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
        """x, the layer's input -> the scaled and shifted output, of the layer's output shape and dtype."""
        y = self.base_layer(x)
        y = y * self.gamma.to(y.dtype).view(self.channels)
        return y if self.beta is None else y + self.beta.to(y.dtype).view(self.channels)

    @property
    def weight(self) -> Tensor:
        """The weight of the layer with the same outputs, for who reads it."""
        return self.gamma.view(-1, *[1] * (self.base_layer.weight.ndim - 1)) * self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer with the same outputs; None where the layer can have none."""
        bias = getattr(self.base_layer, "bias", None)
        return self.beta if bias is None else self.gamma * bias + self.beta

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer itself with gamma and beta in its weight and bias; one whose bias is None gets a bias."""
        weight, bias = self.weight, self.bias
        layer = self.base_layer.merged() if hasattr(self.base_layer, "merged") else self.base_layer
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        return layer
