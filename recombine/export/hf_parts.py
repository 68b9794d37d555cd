"""The matrices inside the layers of a compressed model, plain and packed, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weight_of(linear: nn.Module, like: Tensor) -> Tensor:
    """The weight (out, in) of a layer without bias. One that a quantiser or an adapter has changed is called for it."""
    if type(linear) is nn.Linear:
        return linear.weight
    if isinstance(linear, Packed):
        return linear.value(like.dtype)
    return linear(torch.eye(linear.in_features, dtype=like.dtype, device=like.device)).T


class Packed(nn.Module):
    """y = W x + bias with W as integers of 8 or 4 bits, and one scale for each group of entries of the flattened W.

    A code is an integer plus 2^(bits - 1). Of two codes of 4 bits in a byte the first is the lower one.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, group: int):
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        groups = -(-in_features * out_features // group)
        self.register_buffer("codes", torch.zeros(groups, group * bits // 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(groups, dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def value(self, dtype: torch.dtype) -> Tensor:
        """W (out, in)."""
        wide = torch.float32 if dtype == torch.float16 else dtype  # float16 has no place for small scales
        codes = self.codes.to(wide)
        if self.bits == 4:  # exact, and any format of graphs knows it
            high = (codes / 16).floor()
            codes = torch.stack((codes - 16 * high, high), -1).flatten(1)
        values = ((codes - 2 ** (self.bits - 1)) * self.scale.to(wide)[:, None]).to(dtype)
        return values.flatten()[: self.in_features * self.out_features].view(self.out_features, self.in_features)

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.bfloat16:
            self.scale = scale.to(self.scale.device)  # another type may have lost some of it
        return self

    @property
    def weight(self) -> Tensor:
        """W for who reads it."""
        return self.value(torch.get_default_dtype() if self.bias is None else self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out)."""
        return F.linear(x, self.value(x.dtype), self.bias)


def matrix(in_features: int, out_features: int, bits: int | None = None, group: int | None = None) -> nn.Module:
    """A linear layer without bias, whose weight is packed to so many bits where they are given."""
    if bits is None:
        return nn.Linear(in_features, out_features, bias=False)
    return Packed(in_features, out_features, False, bits, group)
