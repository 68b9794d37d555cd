"""y = W x + bias with a packed W: a plain layer whose frozen weight is kept as integers."""

from torch import Tensor, nn

from recombine.layers.base import own_class
from recombine.layers.packed import HoldsPacked, Packed, linear


class PackedLinear(HoldsPacked, nn.Linear):
    """An nn.Linear whose weight is packed: y = W x + bias.

    Args:
        layer: whose bias it takes over, and whose class merging gives back.
        weight: packed, (out, in).
    """

    def __init__(self, layer: nn.Linear, weight: Packed):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.hold("weight", weight)
        self.bias, self.linear_class = layer.bias, own_class(layer)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out)."""
        return linear(x, self.weight, self.bias)

    def merged(self) -> nn.Linear:
        """An ordinary linear layer with the same outputs."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.__class__ = self.linear_class
        layer.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        if self.bias is not None:
            layer.bias = self.bias
        return layer
