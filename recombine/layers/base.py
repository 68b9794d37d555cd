"""The contract of a recombined linear layer, and the rule that picks its cheaper forward."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RecombinedLinear(nn.Module, ABC):
    """Stands in for an ``nn.Linear``: x (..., in) -> y (..., out).

    A subclass says how its weight is built (`dense_weight`), how to apply it without building it
    (`structured`) and what each costs (`flops`); `forward` takes the cheaper way, the results are the
    same. In eval mode without gradients a built tensor is kept until a parameter changes.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None if bias is None else frozen(bias))
        self._kept: tuple | None = None

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """(out, in): what forward applies."""

    @property
    def weight(self) -> Tensor:
        """The same, under the name that an nn.Linear has: a layer may be adapted again, by peft too."""
        return self.dense_weight()

    @abstractmethod
    def factored_forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out), without bias and without building the weight."""

    @abstractmethod
    def flops(self, tokens: int, train: bool) -> tuple[float, float, float]:
        """Multiplications of (structured, dense once built, building), with the backward's when `train`."""

    @abstractmethod
    def spec(self) -> dict:
        """JSON-able keyword arguments of `empty`."""

    @classmethod
    @abstractmethod
    def empty(cls, **spec) -> "RecombinedLinear":
        """A layer of that shape with uninitialised tensors, to be filled from a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        structured, dense, build = self.flops(x.numel() // self.in_features, torch.is_grad_enabled())
        if dense + (0 if self.is_frozen else build) < structured:
            return F.linear(x, self.cached(self.dense_weight), self.bias)
        y = self.factored_forward(x)
        return y if self.bias is None else y + self.bias

    @property
    def is_frozen(self) -> bool:
        """Nothing can change before the next forward, so what is built may be kept."""
        return not (self.training or torch.is_grad_enabled())

    def cached(self, build: Callable[[], Tensor]) -> Tensor:
        """build(), once for as long as the layer is in eval mode without gradients and no parameter changes."""
        if not self.is_frozen:
            self._kept = None
            return build()
        tensors = (*self.parameters(recurse=False), *self.buffers(recurse=False))
        key = (build.__name__, *((t.data_ptr(), t._version, t.dtype) for t in tensors))
        if self._kept is None or self._kept[0] != key:
            with torch.autocast(next(self.parameters()).device.type, enabled=False):
                self._kept = (key, build())
        return self._kept[1]

    def share_bias_with(self, linear: nn.Module) -> "RecombinedLinear":
        """Takes over the parameters that it shares with the layer it replaces, the bias; returns itself."""
        if linear.bias is not None:
            self.bias = linear.bias
        return self

    def train(self, mode: bool = True) -> "RecombinedLinear":
        self._kept = None
        return super().train(mode)

    def merged(self) -> nn.Linear:
        """An ordinary linear layer with the same outputs."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense_weight().detach().clone())
        if self.bias is not None:
            linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.spec().items())


def frozen(tensor: Tensor) -> nn.Parameter:
    """The tensor as a parameter that does not train; a parameter stays the same object."""
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.contiguous(), requires_grad=False)
    return parameter.requires_grad_(False)
