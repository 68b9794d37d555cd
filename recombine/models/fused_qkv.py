"""Layers as nn.Linear by nn.Linear where a model has them otherwise: q, k and v (or gate and up) as one fused layer,
transposed (GPT-2's Conv1D), or as a weight that attention reads instead of calling the layer (timm's Beit, Eva).

The rows of a fused weight are a number of groups, each with rows of q, then of k, then of v (`Layout`). Nothing here
happens by itself: `roles.open_layers` and `close` are called by who rewrites.
"""

import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recombine.errors import UsageError

READS = "qkv_bias_separate"  # timm's switch: True calls the fused layer and adds the bias afterwards
OPENED = "while recombined"  # its value here, which is true and tells it from what the model came with
TRANSPOSED = "recombined_conv1d"  # attribute of a module: names of its children that were Conv1D


class Layout(NamedTuple):
    """How the outputs of a fused layer are ordered: `groups` times the parts one after the other.

    groups: 1 for [q; k; v]; the number of heads where each head has its q, k and v side by side.
    widths: outputs of each part within a group.
    """

    groups: int
    widths: tuple[int, ...]


def equal_parts(owner: nn.Module, fused: nn.Module, parts: int = 3) -> Layout:
    """One after the other, all as wide."""
    return Layout(1, (fused.out_features // parts,) * parts)


def _by_head(heads: Callable[[nn.Module], int]) -> Callable[..., Layout]:
    def layout(owner: nn.Module, fused: nn.Module) -> Layout:
        return Layout(heads(owner), (fused.out_features // heads(owner) // 3,) * 3)

    return layout


def _falcon(owner: nn.Module, fused: nn.Module) -> Layout:
    groups = owner.num_kv_heads if owner.new_decoder_architecture or not owner.multi_query else 1
    return Layout(groups, (owner.num_heads // groups * owner.head_dim, owner.head_dim, owner.head_dim))


def _phi3(owner: nn.Module, fused: nn.Module) -> Layout:
    shared = owner.num_key_value_heads * owner.head_dim
    return Layout(1, (fused.out_features - 2 * shared, shared, shared))


def _maxvit(owner: nn.Module, fused: nn.Module) -> Layout:
    return _by_head(lambda attention: attention.num_heads if attention.head_first else 1)(owner, fused)


LAYOUTS = {  # class that holds the fused qkv -> its layout; of every other class: equal parts
    "GPTNeoXAttention": _by_head(lambda attention: attention.config.num_attention_heads),
    "BloomAttention": _by_head(lambda attention: attention.num_heads),
    "FalconAttention": _falcon,
    "FalconFlashAttention2": _falcon,
    "Phi3Attention": _phi3,
    "AttentionCl": _maxvit,
}


def layout_of(owner: nn.Module, fused: nn.Module, parts: tuple[str, ...]) -> Layout:
    """The order of a fused layer's outputs, by the class of the module that holds it."""
    if parts == ("q", "k", "v") and (known := LAYOUTS.get(type(owner).__name__)):
        return known(owner, fused)
    return equal_parts(owner, fused, len(parts))


class SplitLinear(nn.Module):
    """A fused projection as one layer for each part: x (..., in) -> all outputs in the fused order (..., out).

    Args:
        fused: an nn.Linear.
        parts: names of the layers, q, k and v, for example.
        layout: of its outputs.
    """

    def __init__(self, fused: nn.Linear, parts: tuple[str, ...], layout: Layout):
        super().__init__()
        self.in_features, self.out_features = fused.in_features, fused.out_features
        self.parts, self.layout, self.kind = parts, layout, type(fused)
        for i, name in enumerate(parts):
            self.add_module(name, _part(fused, layout, i, copy=True))
        self.train(fused.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to the outputs of all parts (..., out)."""
        outputs, groups = [getattr(self, name)(x) for name in self.parts], self.layout.groups
        if groups == 1:
            return torch.cat(outputs, dim=-1)
        return torch.cat([y.unflatten(-1, (groups, -1)) for y in outputs], dim=-1).flatten(-2)


def order_of(layout: Callable | None, holder: nn.Module, fused: nn.Module, parts: tuple[str, ...], name: str) -> Layout:
    """The order of a fused layer's outputs, by a family's own `layout` where it has one.

    Raises:
        UsageError: the family's does not describe this layer, whose name this is.
    """
    if layout is None:
        return layout_of(holder, fused, parts)
    order = layout(holder, fused)
    fits = isinstance(order, Layout) and len(order.widths) == len(parts)
    if not fits or order.groups * sum(order.widths) != fused.out_features:
        fix = f"return a recombine.Layout(groups, (widths of {', '.join(parts)})) with groups times all widths of them"
        raise UsageError(f"Family.layout gives {order!r} for {name}, which has {fused.out_features} outputs: {fix}")
    return order


def split(
    model: nn.Module, names: Iterable[str], parts: tuple[str, ...] = ("q", "k", "v"), layout: Callable | None = None
) -> None:
    """Replaces the fused nn.Linear layers of these names, in place, one after the other.

    Args:
        layout: as in `Family`.
    """
    for name in names:
        fused, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        order = order_of(layout, owner, fused, parts, name)
        model.set_submodule(name, SplitLinear(fused, parts, order))


def fuse(
    model: nn.Module, keep: frozenset[str] = frozenset(), put: Callable[[str, nn.Module], None] | None = None
) -> list[str]:
    """Undoes `split` wherever the parts are plain nn.Linear again, but for the layers of the names `keep`.

    Returns the names of the layers that are fused now.

    Args:
        put: puts a layer in the place of that name; None: `set_submodule`.
    """
    splits = (name for name, module in model.named_modules() if isinstance(module, SplitLinear) and _plain(module))
    fused = [name for name in splits if name not in keep]
    for name in fused:
        (put or model.set_submodule)(name, _join(model.get_submodule(name)))
    return fused


def call(model: nn.Module, names: Iterable[str]) -> None:
    """Prepares layers, in place: what is transposed becomes an nn.Linear, and what is read is called."""
    for name in names:
        layer, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        if is_transposed(layer):
            model.set_submodule(name, _linear(layer, copy=True))
            setattr(owner, TRANSPOSED, [*getattr(owner, TRANSPOSED, []), name.rpartition(".")[2]])
        if getattr(owner, READS, True) is False and getattr(owner, "q_bias", None) is not None:
            setattr(owner, READS, OPENED)


def close(model: nn.Module, put: Callable[[str, nn.Module], None] | None = None) -> None:
    """Undoes `call` and `split` wherever the layers are plain nn.Linear again, in place. put: as in `fuse`."""
    put = put or model.set_submodule
    fuse(model, put=put)
    for path in [name for name, _ in model.named_modules()]:
        owner = model.get_submodule(path)
        if getattr(owner, READS, None) == OPENED and type(owner.qkv) is nn.Linear and owner.qkv.bias is None:
            setattr(owner, READS, False)  # a bias that a method has added would not be read
        if names := getattr(owner, TRANSPOSED, None):
            left = [key for key in names if type(getattr(owner, key)) is not nn.Linear]
            for key in set(names) - set(left):
                put(f"{path}.{key}".lstrip("."), _transposed(getattr(owner, key)))
            setattr(owner, TRANSPOSED, left)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's Conv1D: a linear layer with the weight (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def as_linear(module: nn.Module) -> nn.Module:
    """A Conv1D as an nn.Linear that views its weight; every other module as it is."""
    return _linear(module, copy=False) if is_transposed(module) else module


def _linear(conv: nn.Module, copy: bool) -> nn.Linear:
    linear = nn.Linear(conv.weight.shape[0], conv.nf, device="meta")
    weight = conv.weight.detach().T
    linear.weight = nn.Parameter(weight.contiguous() if copy else weight, requires_grad=conv.weight.requires_grad)
    linear.bias = conv.bias
    return linear.train(conv.training)


def _transposed(linear: nn.Linear) -> nn.Module:
    conv = sys.modules["transformers.pytorch_utils"].Conv1D(1, 1)
    conv.nf, conv.nx = linear.out_features, linear.in_features
    weight = linear.weight.detach().T.contiguous()
    conv.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv.train(linear.training)


def part_of(fused: nn.Module, parts: tuple[str, ...], name: str, layout: Layout) -> nn.Linear:
    """One part of a fused layer as an nn.Linear; where a part's rows lie together it views the fused tensors."""
    return _part(as_linear(fused), layout, parts.index(name), copy=False)


def _part(fused: nn.Linear, layout: Layout, i: int, copy: bool) -> nn.Linear:
    """The rows of the i-th part; copied where it stays: shared storage can be neither saved nor sharded."""
    groups, start, width = layout.groups, sum(layout.widths[:i]), layout.widths[i]
    linear = nn.Linear(fused.in_features, groups * width, bias=fused.bias is not None, device="meta")
    for key, parameter in fused.named_parameters():
        rows = parameter.detach().unflatten(0, (groups, -1)).narrow(1, start, width).flatten(0, 1)
        setattr(linear, key, nn.Parameter(rows.clone() if copy else rows, requires_grad=parameter.requires_grad))
    return linear


def _join(split: SplitLinear) -> nn.Linear:
    layers, groups = [getattr(split, name) for name in split.parts], split.layout.groups
    fused = split.kind(split.in_features, split.out_features, bias=layers[0].bias is not None, device="meta")
    for key in dict(fused.named_parameters()):
        parts = [getattr(linear, key) for linear in layers]
        value = torch.cat([part.detach().unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
        setattr(fused, key, nn.Parameter(value, requires_grad=any(part.requires_grad for part in parts)))
    return fused.train(split.training)


def _plain(split: SplitLinear) -> bool:
    layers = [getattr(split, name) for name in split.parts]
    return all(type(layer) is nn.Linear for layer in layers) and len({layer.bias is None for layer in layers}) == 1
