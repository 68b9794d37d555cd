"""Frozen weights as packed integers of 8 or 4 bits with one bfloat16 scale for each group of consecutive entries.

The groups run through the flattened tensor, as in QLoRA (arXiv 2305.14314, Sec. 2): inside a row where the group
divides it. With the range [-c, c] of a group, its scale is c over 7.5 or 127.5 and an integer is
clamp(round(w / scale)). The scales are those of torchao's `IntxWeightOnlyConfig` with symmetric groups. So are the
integers, but for some halfway between two: torchao rounds 1 / scale to bfloat16. It holds 4 bits in a whole byte, and
no safetensors file holds its tensors.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = (8, 4)
SCALE = torch.bfloat16
PREFIX = "packed_"  # of the name of a packed tensor in its module


def pack(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(codes (G, group bits / 8) uint8, scales (G,)) of a tensor of G groups; the last one is filled up with zeros.

    A code is the integer plus 2^(bits - 1). Of two codes of 4 bits in a byte the first is the lower one.
    """
    flat, top = weight.detach().flatten(), 2 ** (bits - 1)
    if rest := -len(flat) % group:
        flat = F.pad(flat, (0, rest))
    rows = flat.view(-1, group).float()
    scale = (rows.abs().amax(1) / (top - 0.5)).to(SCALE)
    tiny = torch.finfo(SCALE).tiny
    inverse = torch.where(scale < tiny, 0.0, 1 / scale.float().clamp(min=tiny))
    codes = (rows * inverse[:, None]).round_().clamp_(-top, top - 1).add_(top).to(torch.uint8)
    return (codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4), scale


def unpack(codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The values (G, group) of `pack`ed groups."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    wide = torch.float32 if dtype == torch.float16 else dtype  # float16 has no place for small scales
    return codes.to(wide).sub_(2 ** (bits - 1)).mul_(scale.to(wide)[:, None]).to(dtype)


class Packed(nn.Module):
    """A frozen tensor as packed integers: it stands in a module in the place of a parameter.

    See `HoldsPacked`. The scales stay bfloat16 where a model is
    cast; what a value is cast to follows the model.

    Args:
        shape, dtype: of the tensor.
    """

    requires_grad = False

    def __init__(self, codes: Tensor, scale: Tensor, shape: tuple[int, ...], bits: int, dtype: torch.dtype):
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.shape, self.bits, self.dtype = tuple(shape), bits, dtype

    @classmethod
    def of(cls, weight: Tensor, bits: int, group: int) -> "Packed":
        """A tensor, packed."""
        return cls(*pack(weight, bits, group), weight.shape, bits, weight.dtype)

    @classmethod
    def empty(cls, like: Tensor, shape: tuple[int, ...], bits: int, group: int, dtype: str) -> "Packed":
        """One with any values, on the device of another tensor; with its type too, where that has memory."""
        groups = -(-prod(shape) // group)
        codes = torch.empty(groups, group * bits // 8, dtype=torch.uint8, device=like.device)
        kind = getattr(torch, dtype) if like.is_meta else like.dtype
        return cls(codes, torch.empty(groups, dtype=SCALE, device=like.device), shape, bits, kind)

    @property
    def group(self) -> int:
        """Entries of a group."""
        return self.codes.shape[1] * 8 // self.bits

    @property
    def entries(self) -> int:
        """Weights that it stands for."""
        return prod(self.shape)

    def value(self) -> Tensor:
        """The tensor, computed anew. `linear` keeps it packed for the backward."""
        flat = unpack(self.codes, self.scale, self.bits, self.dtype).flatten()
        value = flat[: self.entries].view(self.shape)
        if not torch.compiler.is_compiling():
            value.packed = self
        return value

    def spec(self) -> dict:
        """What `empty` needs beside a tensor; JSON can hold it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "bits": self.bits, "group": self.group, "dtype": dtype}

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty((), dtype=self.dtype, device=self.scale.device)).dtype
        scale = self.scale.data
        super()._apply(fn, recurse)
        if self.scale.dtype != SCALE:
            self.scale.data = scale.to(self.scale.device)  # another type may have lost some of it
        return self

    def extra_repr(self) -> str:
        """The shape and the bits, for printing."""
        return f"{self.shape}, bits={self.bits}, group={self.group}"


class HoldsPacked(nn.Module):
    """A module whose parameters may be packed: reading one by its name then gives its value."""

    def __getattr__(self, name: str):
        packed = vars(self).get("_modules", {}).get(f"{PREFIX}{name}")
        return super().__getattr__(name) if packed is None else packed.value()

    def part(self, name: str) -> "Tensor | Packed | None":
        """A tensor of the module by its name; where it is packed, what holds it, which has its shape."""
        packed = self._modules.get(f"{PREFIX}{name}")
        return self._parameters[name] if packed is None else packed

    def hold(self, name: str, packed: Packed) -> None:
        """Puts a packed tensor in the place of a parameter."""
        del self._parameters[name]
        self.add_module(f"{PREFIX}{name}", packed)

    @property
    def is_packed(self) -> bool:
        """Whether one of its tensors is."""
        return any(isinstance(module, Packed) for module in self._modules.values())


class _Product(torch.autograd.Function):
    """x W^T + bias for a packed W, which its backward unpacks again: no dense weight waits for it."""

    @staticmethod
    def forward(x, weight, bias, codes, scale, packed):
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, _, codes, scale, packed = inputs
        ctx.save_for_backward(codes, scale)
        ctx.save_for_forward(codes, scale)
        ctx.bits, ctx.shape, ctx.dtype = packed.bits, weight.shape, packed.dtype

    @staticmethod
    def weight(ctx, dtype):
        values = unpack(*ctx.saved_tensors, ctx.bits, ctx.dtype).flatten()
        return values[: prod(ctx.shape)].view(ctx.shape).to(dtype)

    @staticmethod
    def jvp(ctx, x, weight, bias, *_):
        y = F.linear(x, _Product.weight(ctx, x.dtype))
        return y if bias is None else y + bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        by_x, _, by_bias, *_ = ctx.needs_input_grad
        weight = _Product.weight(ctx, grad.dtype)
        over_rows = grad.reshape(-1, grad.shape[-1]).sum(0) if by_bias else None
        return (grad @ weight if by_x else None), None, over_rows, None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: int | None = None) -> Tensor:
    """F.linear, which saves no value of a packed weight for the backward.

    Args:
        rows: the weight is read as a matrix with so many rows.
    """
    packed = getattr(weight, "packed", None)
    matrix = weight if rows is None else weight.view(rows, -1)
    if packed is None or not torch.is_grad_enabled():
        return F.linear(x, matrix, bias)
    y = _Product.apply(x.flatten(0, -2) if x.ndim > 2 else x, matrix, bias, packed.codes, packed.scale, packed)
    return y.unflatten(0, x.shape[:-1]) if x.ndim > 2 else y  # outside: what follows may write into it


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type in which a module's weights are read, which a packed one does not show."""
    packed = next((part for part in module.modules() if isinstance(part, Packed)), None)
    return next(module.parameters()).dtype if packed is None else packed.dtype


def entries(module: nn.Module) -> dict[int, int]:
    """Weights by the identity of the parameter that holds them; a packed tensor has its own at its codes."""
    found = {id(p): p.numel() for p in module.parameters()}
    for part in module.modules():
        if isinstance(part, Packed):
            found |= {id(part.codes): part.entries, id(part.scale): 0}
    return found


def packed_in(model: nn.Module) -> dict[str, Packed]:
    """The packed tensors of a model, by all names of the parameters whose places they are in."""
    named = model.named_modules(remove_duplicate=False)
    parts = {name.rpartition(f".{PREFIX}"): module for name, module in named if isinstance(module, Packed)}
    return {f"{owner}.{leaf}": module for (owner, _, leaf), module in parts.items()}
