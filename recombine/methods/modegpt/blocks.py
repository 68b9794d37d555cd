"""The attentions and MLPs of a model's blocks: which layers they are of, and what a dimension or a neuron costs."""

import math
from typing import NamedTuple

from torch import nn

from recombine.core.method import Method, Site, need
from recombine.core.sites import block_of, parent
from recombine.errors import UsageError
from recombine.methods.pruning.mlp import require_whole
from recombine.models import attention, roles
from recombine.models.attention import Heads
from recombine.models.fused_qkv import SplitLinear


class Known(NamedTuple):
    """heads: by the name of the attention module. owner: of a layer of q, k, v or qkv, that module's name.

    block: the place of the block that a layer is in, by its name.
    """

    heads: dict[str, Heads]
    owner: dict[str, str]
    block: dict[str, int]


class Attention(NamedTuple):
    """q, k and v (or one fused qkv) and o of one attention, whose `width` is that of its heads."""

    name: str  # of the module
    block: int
    read: tuple[Site, ...]  # q, k, v or the fused qkv: they read one tensor
    out: Site
    heads: Heads

    @property
    def width(self) -> int:
        """Dimensions of a head."""
        return self.heads.width

    @property
    def weights(self) -> int:
        """Of all its layers."""
        return sum(site.module.weight.numel() for site in (*self.read, self.out))

    @property
    def unit(self) -> int:
        """Weights of one dimension of all heads."""
        return self.weights // self.width

    def step(self, round_to: int) -> int:
        """What smaller widths are multiples of, and so the least."""
        return min(math.lcm(2, round_to) if self.heads.rotary else round_to, self.width)


class Neurons(NamedTuple):
    """up, gate where there is one, and down of one MLP, whose `width` is the number of its neurons."""

    name: str  # of down
    block: int
    read: tuple[Site, ...]  # down: its input is the neurons
    into: tuple[Site, ...]  # up, and gate where there is one
    out: Site  # down

    @property
    def width(self) -> int:
        """Its neurons."""
        return self.out.module.in_features

    @property
    def weights(self) -> int:
        """Of all its layers."""
        return sum(site.module.weight.numel() for site in (*self.into, self.out))

    @property
    def unit(self) -> int:
        """Weights of one neuron."""
        return self.weights // self.width

    def step(self, round_to: int) -> int:
        """What smaller widths are multiples of, and so the least."""
        return min(round_to, self.width)


Part = Attention | Neurons


def largest(part: Part, goal: float, round_to: int) -> int:
    """The largest width of a part whose weights are no more than the goal, the least width where none is."""
    step, most = part.step(round_to), int(goal / part.unit + 1e-9)
    return part.width if most >= part.width else max(step, most // step * step)


def survey(method: Method, model: nn.Module, sites: list[Site]) -> Known:
    """What the layers alone do not say.

    Raises:
        UsageError: an attention's heads cannot be made narrower, or an MLP holds more than up, down and gate.
    """
    names = roles.block_names(model)
    block = {site.name: i for site in sites if (i := block_of(site.name, names)) is not None}
    owner, heads = {}, {}
    for site in sites:
        if site.role in ("q", "k", "v", "qkv"):
            name = parent(site.name)
            if name.rpartition(".")[2] == "qkv" and isinstance(model.get_submodule(name), nn.Linear | SplitLinear):
                name = parent(name)
            owner[site.name] = name
            heads[name] = heads.get(name) or attention.heads(name, model.get_submodule(name))
    if any(site.role in ("up", "down") for site in sites):
        require_whole(method, model, sites)
    return Known(heads, owner, block)


def parts(method: Method, sites: list[Site], known: Known) -> list[Part]:
    """The attentions and MLPs of the target layers, block by block, in each block the attentions first.

    Raises:
        UsageError: an attention or MLP is not named as a whole.
    """
    if missing := [site.name for site in sites if site.name not in known.block]:
        raise UsageError(f"{missing[0]} lies in no block: leave its role out of targets")
    by_role = {role: [s for s in sites if s.role == role] for role in ("qkv", "q", "k", "v", "o", "up", "down", "gate")}
    other = next((site.role for site in sites if site.role not in by_role), None)
    need(other is None, method, "targets", f"{other} is no part of an attention or MLP: leave it out")
    read = list(zip(*([by_role["qkv"]] if by_role["qkv"] else [by_role[part] for part in "qkv"]), strict=False))
    counts = {len(by_role[part]) for part in "qkv"} | {len(by_role["o"]) - len(by_role["qkv"])}
    need(len(counts) == 1, method, "targets", "a head is cut out of q, k, v and o: name all of them, or none")
    into = [by_role[role] for role in ("up", "gate") if by_role[role]]
    whole = {len(layers) for layers in (*into, by_role["down"])}
    need(len(whole) == 1 and (into or not by_role["down"]), method, "targets", "a neuron is cut out of up and down")
    need(bool(read or into), method, "targets", "name q, k, v and o, or up and down, or all of them")
    found: list[Part] = []
    for layers, out in zip(read, by_role["o"], strict=True):
        name = known.owner[layers[0].name]
        found.append(Attention(name, known.block[out.name], layers, out, known.heads[name]))
    for layers in zip(*into, by_role["down"], strict=True):
        *first, down = layers
        alike = all(site.module.out_features == down.module.in_features for site in first)
        need(alike, method, "targets", "up is not as wide as down here: gate and up are in one layer")
        found.append(Neurons(down.name, known.block[down.name], (down,), tuple(first), down))
    return sorted(found, key=lambda part: (part.block, isinstance(part, Neurons)))
