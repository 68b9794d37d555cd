"""WeCoLoRA: copy every other block, then distil into low-rank updates (arXiv 2404.09326).

Blocks 0, r, 2 r, ... of the teacher, r = `keep_every`, are the student. Each of their linear layers becomes
W + left right, left (m, k) = 0, right (k, n) random (Kaiming uniform), scale 1; left and right alone train, in
distillation and, where no other method comes next, in adaptation. Stores m n + k (m + n) per layer that is left. Before
another method adapts, left right is added into W.

Paper: rank 128 on every linear layer of a ViT. Here: clipped to what a layer can have. Where a model has stages
(Swin), every stage counts its own blocks, so that each keeps its first.
"""

import math
from dataclasses import dataclass

from torch import nn

from recombine.core.method import Site, need
from recombine.layers import DeltaLinear
from recombine.methods.pruning.base import Structural, comes_first
from recombine.models import roles


@dataclass(kw_only=True)
class WeCoLora(Structural):
    """Args:
    keep_every: one block of so many is copied; the only knob of the size, so there is none for a budget.
    rank: of the updates, at most the narrower side of a layer.
    """

    keep_every: int = 2
    rank: int = 128

    def check(self, sites: list[Site]) -> None:
        need(self.keep_every >= 1, self, "keep_every", "one block of at least one is copied")
        need(self.rank >= 1, self, "rank", "must be at least 1")

    def prepare(self, model: nn.Module, sites: list[Site], losses) -> None:
        comes_first(self, model)
        names = roles.block_names(model)
        self.blocks = [i for i, name in enumerate(names) if int(name.rpartition(".")[2]) % self.keep_every == 0]
        stay = tuple(f"{names[i]}." for i in self.blocks)
        self.left = [site.linear.weight.shape for site in sites if site.name.startswith(stay)]

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        trained = sum(min(self.rank, m, n) * (m + n) for m, n in self.left)
        return sum(m * n for m, n in self.left) + trained, trained

    def prune(self, model: nn.Module, sites: list[Site]) -> None:
        for name in roles.find(model, self.targets, self.on):  # the blocks have moved up
            model.set_submodule(name, low_rank(model.get_submodule(name), self.rank))

    def distils(self, model: nn.Module) -> set[str]:
        deltas = {id(p) for layer in own(model).values() for p in (layer.left, layer.right)}
        return {name for name, p in model.named_parameters() if id(p) in deltas}

    def finish(self, model: nn.Module, alone: bool) -> None:
        if not alone:
            for name, layer in own(model).items():
                model.set_submodule(name, layer.merged().requires_grad_(False).train(layer.training))


def low_rank(linear: nn.Linear, rank: int) -> DeltaLinear:
    """W + left right with left = 0, so nothing changes yet; left and right train. rank is clipped to the layer."""
    m, n = linear.weight.shape
    left = linear.weight.new_zeros(m, min(rank, m, n))
    right = linear.weight.new_empty(left.shape[1], n)
    nn.init.kaiming_uniform_(right, a=math.sqrt(5))
    layer = DeltaLinear(linear.weight, left, right, bias=linear.bias)
    layer.left.requires_grad_(True)
    layer.right.requires_grad_(True)
    return layer


def own(model: nn.Module) -> dict[str, DeltaLinear]:
    """The layers that the last method made."""
    layers = {name: model.get_submodule(name) for name in model.recombined.targets}
    made = model.recombined.steps[-1].layers
    return {name: layer for name, layer in layers.items() if name in made and isinstance(layer, DeltaLinear)}
