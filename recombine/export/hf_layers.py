"""The layers of a compressed model in plain torch, and what puts them into a model.

The text of this file and of hf_parts.py is part of every exported folder, so they import only torch. They
compute as `recombine.layers` does in inference, product by product: exported logits are equal bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine.export.hf_parts import Packed, matrix, weight_of

GATES = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "none": lambda a: a}
PLACEMENTS = {  # B (u, r), A (r, s), gate -> (u, s)
    "pre": lambda b, a, gate: b @ gate(a),
    "post": lambda b, a, gate: gate(b @ a),
    "temp": lambda b, a, gate: gate(b) @ a,
}


class Compressed(nn.Module):
    """A linear layer (..., in) -> (..., out) that is kept as parts.

    Args:
        shared: what several layers share, by name; the model holds it, not this layer.
        built: up to so many tokens the dense weight costs less than the parts where it is kept, while nothing can
            change; -1: for any number, kept or not.
    """

    def __init__(self, shared: nn.ModuleDict, in_features: int, out_features: int, bias: bool, built: int):
        super().__init__()
        self.in_features, self.out_features, self.built = in_features, out_features, built
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.found = (shared,)  # in a tuple, so that the layer does not register it
        self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out)."""
        if self.built < 0 or self.keeps() and x.numel() // self.in_features <= self.built:
            return F.linear(x, self.dense(x), self.bias)
        return self.parts(x)

    def keeps(self) -> bool:
        """Whether what is built may be kept: in eval mode without gradients, and without adapters on the parts."""
        busy = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        return not busy and all(type(part) is nn.Linear for part in self.factors())

    @property
    def weight(self) -> Tensor:
        """The dense weight under nn.Linear's name, for who reads it."""
        given = (p for p in self.parameters() if p.is_floating_point())
        return self.build(next(given, torch.empty(0)))

    def dense(self, x: Tensor) -> Tensor:
        """The dense weight; in eval mode without gradients the one of before, unless a part has changed."""
        if not self.keeps():
            self.kept = None
            return self.build(x)
        key = [(part.weight.data_ptr(), part.weight._version, part.weight.dtype) for part in self.factors()]
        if self.kept is None or self.kept[0] != key:
            with torch.autocast(x.device.type, enabled=False):
                self.kept = (key, self.build(x))
        return self.kept[1]


class Factored(Compressed):
    """y = left (right x) + bias: right (k, in) and left (out, k). right None: left alone; a word: it is shared.

    pivot: right is the identity on the first k inputs of an order (in,), and stands for the others alone, (k, in - k).
    packed: bits and group of left and right, by name. Beside a packed left, a core (k, k) or a diagonal (k,) may stand.
    """

    def __init__(self, shared, in_features, out_features, bias, built, rank, right, pivot=False, packed=None):
        super().__init__(shared, in_features, out_features, bias, built)
        self.of_right, self.rank, packed = right, rank, packed or {}
        if right == "own":
            self.right = matrix(in_features - (rank if pivot else 0), rank, *packed.get("right", ()))
        self.left = matrix(rank, out_features, *packed.get("left", ()))
        self.core = matrix(rank, rank) if "core" in packed else None
        self.diagonal = nn.Parameter(torch.empty(rank)) if "diagonal" in packed else None
        self.register_buffer("order", torch.arange(in_features) if pivot else None)

    def factors(self) -> tuple[nn.Module, ...]:
        """left, and right where there is one."""
        if self.of_right is None:
            return (self.left,)
        return self.left, self.right if self.of_right == "own" else self.found[0][self.of_right]

    def parts(self, x: Tensor) -> Tensor:
        """The product and the bias."""
        left, *right = self.factors()
        for layer in right:
            x = layer(x) if self.order is None else self.mixed(layer, x)
        x = x if self.core is None else self.core(x)
        x = x if self.diagonal is None else x * self.diagonal.to(x.dtype)
        if type(left) is nn.Linear:
            return F.linear(x, left.weight, self.bias)
        if type(left) is Packed:
            return F.linear(x, left.value(x.dtype), self.bias)
        y = left(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def mixed(self, right: nn.Module, x: Tensor) -> Tensor:
        """x (..., in) by the identity and right, (..., k). In a graph they are one matrix, which runtimes fold."""
        if torch.compiler.is_exporting() and type(right) is nn.Linear:
            both = torch.cat([torch.eye(self.rank, dtype=right.weight.dtype), right.weight], 1)
            return F.linear(x, both.index_select(1, self.order.argsort()))
        z = right(x.index_select(-1, self.order[self.rank :]))
        return z + x.index_select(-1, self.order[: self.rank]).to(z.dtype)

    def build(self, x: Tensor) -> Tensor:
        """The dense weight."""
        left, right = (weight_of(part, x) for part in self.factors())
        left = left if self.core is None else left @ weight_of(self.core, x)
        left = left if self.diagonal is None else left * self.diagonal
        if self.order is None:
            return left @ right
        return torch.cat([left, left @ right], 1).index_select(1, self.order.argsort())


class SharedBasis(Compressed):
    """W = reshape(basis . gate(mixer)): the basis (out in / s, r) is shared, the mixer (r, s) is the layer's own."""

    def __init__(self, shared, in_features, out_features, bias, built, rank, chunk, gate, placement, basis, packed=()):
        super().__init__(shared, in_features, out_features, bias, built)
        self.of_basis, self.gate, self.placement, self.chunk = basis, GATES[gate], placement, chunk
        self.mixer = matrix(chunk, rank, *packed)

    def factors(self) -> tuple[nn.Module, ...]:
        """The basis and the mixer."""
        return self.found[0][self.of_basis], self.mixer

    def parts(self, x: Tensor) -> Tensor:
        """Chunks of x by the mixer, then all by the basis, and the bias."""
        basis, mixer = (weight_of(part, x) for part in self.factors())
        mixer, basis = (self.gate(mixer), basis) if self.placement == "pre" else (mixer, self.gate(basis))
        mixed = F.linear(x.reshape(*x.shape[:-1], -1, self.chunk), mixer)  # (..., in / s, r)
        return F.linear(mixed.flatten(-2), basis.reshape(self.out_features, -1), self.bias)

    def build(self, x: Tensor) -> Tensor:
        """The dense weight."""
        basis, mixer = (weight_of(part, x) for part in self.factors())
        return PLACEMENTS[self.placement](basis, mixer, self.gate).reshape(self.out_features, self.in_features)


class Scaled(nn.Module):
    """y = gamma * layer(x) + beta, by output channel."""

    def __init__(self, layer: nn.Module, width: int, beta: bool, channels: list[int]):
        super().__init__()
        self.base_layer, self.channels = layer, channels
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width)) if beta else None

    @property
    def weight(self) -> Tensor:
        """The weight of the layer with the same outputs, for who reads it."""
        return self.gamma.view(-1, *[1] * (self.base_layer.weight.ndim - 1)) * self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """x, the layer's input -> its output, scaled and shifted."""
        y = self.base_layer(x)
        y = y * self.gamma.to(y.dtype).view(self.channels)
        return y if self.beta is None else y + self.beta.to(y.dtype).view(self.channels)


class Adapted(nn.Module):
    """y = layer(x) + scale up (down x): a LoRA beside any layer."""

    def __init__(self, layer: nn.Module, in_features: int, out_features: int, rank: int, scale: float):
        super().__init__()
        self.base_layer, self.scale = layer, scale
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        """The layer's own, without the adapter, as in peft."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out)."""
        return self.base_layer(x) + self.up(self.down(x)) * self.scale


class Split(nn.Module):
    """A fused projection as one layer for each part: x (..., in) -> all outputs in the fused order (..., out).

    Args:
        parts: their names. groups, widths: the outputs are so many groups, each with so many outputs of every part.
        bias: whether each part has one.
    """

    def __init__(self, in_features: int, out_features: int, parts: list, groups: int, widths: list, bias: list):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.names, self.groups = parts, groups
        for name, width, has_bias in zip(parts, widths, bias, strict=True):
            self.add_module(name, nn.Linear(in_features, groups * width, has_bias))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to the outputs of all parts (..., out)."""
        outputs = [getattr(self, name)(x) for name in self.names]
        if self.groups == 1:
            return torch.cat(outputs, dim=-1)
        return torch.cat([y.unflatten(-1, (self.groups, -1)) for y in outputs], dim=-1).flatten(-2)


KINDS = {"factored": Factored, "shared_basis": SharedBasis}
AROUND = {"scaled": Scaled, "adapted": Adapted}
PLAIN = {"linear": nn.Linear, "split": Split, "packed": Packed}


def made(spec: dict, before: nn.Module, shared: nn.ModuleDict) -> nn.Module:
    """The layer of an entry of config.json's `recombined.layers`; before: what stands there in the plain model."""
    spec = dict(spec)
    kind = spec.pop("kind")
    if kind in AROUND:
        base = spec.pop("base")
        return AROUND[kind](before if base is None else made(base, before, shared), **spec)
    return PLAIN[kind](**spec) if kind in PLAIN else KINDS[kind](shared, **spec)


def put_layers(model: nn.Module, plan: dict) -> None:
    """Replaces the layers of a plain model by those of config.json's `recombined`, in place; their values are any."""
    shared = nn.ModuleDict({key: matrix(*size) for key, size in plan["shared"].items()})
    for name, spec in plan["layers"].items():
        model.set_submodule(name, made(spec, model.get_submodule(name), shared))
    for name, attributes in plan["attributes"].items():
        for key, value in attributes.items():
            setattr(model.get_submodule(name), key, value)
    if shared:
        model.shared_bases = shared
