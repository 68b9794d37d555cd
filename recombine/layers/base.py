"""The contract of a recombined linear layer, and the rule that picks the cheaper of its two forward passes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine.layers.packed import HoldsPacked

OVERHEAD = 1.1  # seconds per multiplication without the built weight / with it (experiments/runtime/README.md)
START = 100e3  # multiplications in the time that the second product of a kept layer takes to start (there, too)
MANY = 2**20  # tokens, where their number is not known: what is built then costs next to nothing


class RecombinedLinear(HoldsPacked, ABC):
    """Stands in for an ``nn.Linear``: x (..., in) -> y (..., out).

    A subclass says how its weight is built (`dense_weight`), how it is applied without being built
    (`factored_forward`), and what either costs (`flops`). `forward` takes the cheaper way; both give the same result.
    In eval mode without gradients a built tensor is kept until a parameter changes. While torch.compile or
    torch.export looks on, nothing is kept, nor where a tensor is packed, which is to save memory. Under autocast the
    output has autocast's dtype, as nn.Linear's has.

    Args:
        bias: (out,), which starts frozen; None: the layer has none.
    """

    linear_class: type[nn.Linear] = nn.Linear  # what merging gives; the class of the layer that this one replaces

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None if bias is None else frozen(bias))
        self._kept: tuple | None = None

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight (out, in) that `forward` applies."""

    @property
    def weight(self) -> Tensor:
        """`dense_weight` under nn.Linear's name, so that a layer can be adapted again, by peft too."""
        return self.dense_weight()

    @abstractmethod
    def factored_forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out), with the bias, without building the weight."""

    def common(self) -> tuple[Tensor, ...]:
        """What adapters of one base share of the layer; empty: nothing by itself.

        A layer that has it is `leave(within(enter(x)))`, where only `within` reads tensors beside these and the bias.
        """
        return ()

    @abstractmethod
    def flops(self, tokens: int, train: bool) -> tuple[float, float, float]:
        """Multiplications of (`factored_forward`, the product with a built weight, building that weight).

        Args:
            tokens: rows of the input.
            train: count those of the backward pass as well.
        """

    @abstractmethod
    def spec(self) -> dict:
        """The keyword arguments of `empty`; JSON can hold them."""

    @classmethod
    @abstractmethod
    def empty(cls, **spec) -> "RecombinedLinear":
        """A layer of that shape with uninitialised tensors, which a checkpoint fills."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out), by the cheaper way.

        With gradients that is the one with fewer multiplications. Without, those of the structured way count
        `OVERHEAD` times: it is two thinner products. Where weights are kept it also has `START` of them more.
        An exported graph has one way for every batch size: the one that is cheaper for many tokens.
        """
        tokens = MANY if torch.compiler.is_exporting() else x.numel() // self.in_features
        unpacks = self.is_packed and torch.is_grad_enabled()  # whose backward would keep a built weight
        if not unpacks and self.is_cheaper_built(tokens, torch.is_grad_enabled(), self.is_frozen):
            return F.linear(x, self.cached(self.dense_weight), self.bias)
        return self.factored_forward(x)

    def is_cheaper_built(self, tokens: int, train: bool, kept: bool) -> bool:
        """Whether the product with a built weight costs less.

        Args:
            tokens, train: as in `flops`.
            kept: the weight is there already.
        """
        structured, dense, build = self.flops(tokens, train)
        if train:
            return dense + (0 if kept else build) < structured
        return dense + (-START if kept else build) < structured * OVERHEAD

    def built_up_to(self) -> int:
        """Up to how many tokens the product with a kept weight costs less in inference; -1: for any number."""
        structured, dense, _ = self.flops(1, train=False)
        gain = dense - structured * OVERHEAD
        return -1 if gain <= 0 else math.ceil(START / gain) - 1

    @property
    def is_frozen(self) -> bool:
        """Whether nothing can change before the next forward, so that what is built may be kept."""
        busy = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        return not (busy or self.is_packed)

    def cached(self, build: Callable[[], Tensor]) -> Tensor:
        """build(), computed once while the layer is in eval mode without gradients and no parameter changes.

        What is written through `.data` torch does not count as a change; `eval()` after it drops what was built.
        """
        if torch.compiler.is_compiling():
            return build()
        tensors = [t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None]
        if not self.is_frozen or any(t.is_inference() for t in tensors):  # these do not count their changes
            self._kept = None
            return build()
        key = (build.__name__, *((t.data_ptr(), t._version, t.dtype) for t in tensors))
        if self._kept is None or self._kept[0] != key:
            device = next(self.parameters()).device.type
            with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
                self._kept = (key, build())
        return self._kept[1]

    def __getstate__(self) -> dict:
        """What a copy takes over: all but what was built."""
        return vars(self) | {"_kept": None}

    def share_bias_with(self, linear: nn.Module) -> "RecombinedLinear":
        """Takes over the bias of the layer that this one replaces, as the same Parameter, and its class.

        Returns itself.
        """
        self.linear_class = own_class(linear)
        if linear.bias is not None:
            self.bias = linear.bias
        return self

    def train(self, mode: bool = True) -> "RecombinedLinear":
        """As nn.Module.train; what was built is dropped."""
        self._kept = None
        return super().train(mode)

    def merged(self) -> nn.Linear:
        """An ordinary linear layer with the same outputs."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.__class__ = self.linear_class
        linear.weight = nn.Parameter(self.dense_weight().detach().clone())
        if self.bias is not None:
            linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        """The entries of `spec`, for printing."""
        return ", ".join(f"{k}={v}" for k, v in self.spec().items())


def own_class(linear: nn.Module) -> type[nn.Linear]:
    """The class that merging gives a layer: its own where that adds no state to nn.Linear's, or else nn.Linear."""
    if isinstance(linear, RecombinedLinear):
        return linear.linear_class
    more = vars(linear).keys() - vars(nn.Linear(1, 1, device="meta")).keys() - {"_is_hf_initialized"}  # of transformers
    plain = not (more or linear._modules or linear._buffers)
    return type(linear) if plain and isinstance(linear, nn.Linear) else nn.Linear


def frozen(tensor: Tensor) -> nn.Parameter:
    """The tensor as a frozen parameter. One that is a parameter already stays the same object."""
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.contiguous(), requires_grad=False)
    return parameter.requires_grad_(False)
