"""MoDeGPT: every block keeps fewer neurons and narrower heads, in closed form (arXiv 2408.09632), with an intercept.

The MLP loses neurons: those of the largest ridge leverage scores stay, and what the others gave is predicted from them
and folded into down (CORP, arXiv 2602.05243; see pruning/compensation.py). Of every head q and k lose dimensions, and v
and o become the best product of that rank (closed_forms.py). Ordinary, smaller linear layers stay. A block stores
k (2 d) weights for k neurons, k (3 d) with a gate, and k (4 d) for each head of k dimensions.

The labels of the calibration data are not read, and no gradient is needed. All that is left trains in distillation.

Rotary positions turn pairs of dimensions by frequencies of their own. There pairs are selected, in each head others,
and the attention selects the frequencies (models/rotary.py). Heads that share keys are cut alike.

Paper: queries and keys are selected by CR everywhere (`query_key=select`). CORP maps the selected ones by an affine
function. Here: without rotary positions the best product of rank k is taken, whose error is no larger than either's.
Paper: second moments alone. Here: with `intercept` moments are centred where a bias takes the rest, as in CORP's MLP.
Keys are centred too, since softmax drops what a query adds to all its logits.
Paper's code: a group of heads that share v truncates v alone. Here: the group's output matrices count, stacked.
Paper: all parts of a block lose the same share. Here: heads take whole dimensions, neurons make up for it.
Paper's code: the ridges are absolute. Here: they are shares of the mean of the diagonal.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recombine.core.calibration import Losses
from recombine.core.method import Site, need, need_losses
from recombine.methods.modegpt import blocks, cutting
from recombine.methods.modegpt.allocation import sparsities, turns
from recombine.methods.modegpt.blocks import Attention, Part
from recombine.methods.pruning.base import Structural, comes_first, reconfigure
from recombine.methods.pruning.compensation import Moments
from recombine.models import fused_qkv
from recombine.runtime import progress
from recombine.runtime.kinds import Count, Positive, PositiveShare, Weight


@dataclass(kw_only=True)
class Modegpt(Structural):
    """Narrower heads and fewer neurons with closed-form compensation, from inputs alone (arXiv 2408.09632, 2602.05243).

    Args:
        ratio: share of the target layers' weights that is kept.
        allocation: uniform, the same share of every block; or blocks, more of those that turn their input more.
        smoothing: of the allocation by blocks; the larger, the more alike.
        max_sparsity: the largest share that the allocation by blocks cuts from one.
        query_key: svd, the best product where positions do not turn queries and keys; or select.
        intercept: biases take the means of what is cut; where a layer has no bias, nothing does.
        leverage: ridge of the neurons' scores, as a share of their mean second moment.
        ridge: of the compensation, likewise.
        round_to: neurons and head dimensions stay in multiples of this, as far as they were.
        as_paper: fields that have their default take those of the paper, which `paper` names.
    """

    targets: tuple[str, ...] = ("qkv", "o", "up", "down", "gate?")
    ratio: float = 0.5
    allocation: str = "uniform"
    smoothing: Positive = 0.15
    max_sparsity: PositiveShare = 0.8
    query_key: str = "svd"
    intercept: bool = True
    leverage: Positive = 1e-2
    ridge: Weight = 1e-6
    round_to: Count = 1
    as_paper: bool = False

    paper: ClassVar[dict[str, Any]] = {"query_key": "select", "intercept": False, "allocation": "blocks"}
    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}
    sizes_need_statistics: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        self.known: blocks.Known | None = None  # of `survey`
        self.scores: Tensor | None = None  # of the blocks, for the allocation by them

    def survey(self, model: nn.Module, sites: list[Site]) -> None:
        comes_first(self, model)
        self.known = blocks.survey(self, model, sites)

    def check(self, sites: list[Site]) -> None:
        need(0 < self.ratio <= 1, self, "ratio", "is a share of the weights, so it must lie in (0, 1]")
        need(self.allocation in ("uniform", "blocks"), self, "allocation", "must be uniform or blocks")
        need(self.query_key in ("svd", "select"), self, "query_key", "must be svd or select")
        need(self.smoothing > 0, self, "smoothing", "must be more than 0")
        need(0 < self.max_sparsity <= 1, self, "max_sparsity", "is a share that is cut, so it must lie in (0, 1]")
        need(self.leverage > 0, self, "leverage", "must be more than 0, or no neuron scores more than another")
        need(self.ridge >= 0, self, "ridge", "must be 0 or more")
        need(self.round_to >= 1, self, "round_to", "must be at least 1")
        least = math.ceil(1000 * self.least(sites)) / 1000
        need(self.ratio >= least, self, "ratio", f"must be at least {least}: one dimension and one neuron a block")

    def parts(self, sites: list[Site]) -> list[Part]:
        """The attentions and MLPs of the target layers, in the order of the blocks."""
        return blocks.parts(self, sites, self.known)

    def statistics_needed(self) -> set[str]:
        return {"inputs", "mean"}

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        self.by_name = {part.read[0].name: part for part in self.parts(sites)}
        self.left = self.widths(sites)
        return [list(part.read) for part in self.by_name.values()]

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """The new tensors of a part of a block."""
        part, inputs = self.by_name[group[0].name], self.stats[group[0].name].inputs
        return self.cut(part, Moments(inputs.xx, inputs.mean), self.left[part.name])

    def cut(self, part: Part, moments: Moments, width: int) -> dict[str, Tensor]:
        """The tensors of a part with so many dimensions a head, or neurons, by name."""
        if width == part.width:
            return {}
        if isinstance(part, Attention):
            return cutting.attention(part, moments, width, self.query_key == "select", self.intercept)
        return cutting.mlp(part, moments, width, self.leverage, self.ridge, self.intercept)

    def before_statistics(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        if self.allocation == "blocks":
            need_losses(self, losses)
            self.scores = turns(model, losses)

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        return [i / 1000 for i in range(math.ceil(1000 * self.least(sites)), 1001)]

    def least(self, sites: list[Site]) -> float:
        """The ratio at which every part has its least width."""
        parts = self.parts(sites)
        return sum(part.unit * part.step(self.round_to) for part in parts) / sum(part.weights for part in parts)

    def shares(self, parts: list[Part]) -> dict[int, float]:
        """The share of its weights that each block keeps, by its place."""
        places = sorted({part.block for part in parts})
        if self.scores is None:
            return dict.fromkeys(places, self.ratio)
        weights = torch.tensor([sum(p.weights for p in parts if p.block == place) for place in places]).double()
        lost = sparsities(self.scores[places], weights, 1 - self.ratio, self.smoothing, self.max_sparsity)
        return dict(zip(places, (1 - lost).tolist(), strict=True))

    def widths(self, sites: list[Site]) -> dict[str, int]:
        """Dimensions of a head, or neurons, that are left of each part, by its name."""
        parts, found = self.parts(sites), {}
        for place, share in self.shares(parts).items():
            here = [part for part in parts if part.block == place]
            left = share * sum(part.weights for part in here)
            for i, part in enumerate(here):  # attentions come first
                goal = left * part.weights / sum(other.weights for other in here[i:])
                found[part.name] = blocks.largest(part, goal, self.round_to)
                left -= part.unit * found[part.name]
        return found

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        widths = self.widths(sites)
        return sum(part.unit * widths[part.name] for part in self.parts(sites)), 0

    def notes(self, sites: list[Site]) -> list[str]:
        parts, said = self.parts(sites), []
        if self.query_key == "svd" and any(isinstance(p, Attention) and p.heads.rotary for p in parts):
            said.append(f"{self.key}.query_key=svd: positions turn queries and keys here, so pairs are selected")
        if self.intercept and (bare := [p for p in parts if p.out.module.bias is None]):
            said.append(f"{self.key}.intercept=true: {bare[0].out.name} has no bias, so nothing takes the means there")
        return said

    def prune(self, model: nn.Module, sites: list[Site]) -> None:
        fused_qkv.split(model, self.split)
        sites = [site._replace(module=model.get_submodule(site.name)) for site in sites]
        parts, widths = self.parts(sites), self.widths(sites)
        self.rotary: dict[str, list[list[int]]] = {}
        for part in progress.of(parts, "cutting", "parts"):
            tensors = self.digested(list(part.read))
            if width := widths[part.name] if widths[part.name] < part.width else 0:
                cutting.put(model, part, tensors, width)
                if "turns" in tensors:
                    self.rotary[part.name] = tensors["turns"].tolist()
        cutting.select(model, self.rotary)
        cutting.rejoin(model)
        cutting.fuse(model)
        neurons = {widths[part.name] for part in parts if not isinstance(part, Attention)}
        if hasattr(model, "config") and len(neurons) == 1 and hasattr(model.config, "intermediate_size"):
            reconfigure(model, intermediate_size=neurons.pop())

    def rewrite(self, model: nn.Module, sites: list[Site], losses: Losses | None = None) -> None:
        self.split = cutting.fuse(model)  # the description is of fused layers
        super().rewrite(model, sites)
        self.structure["rotary"] = self.rotary
        fused_qkv.split(model, self.split)

    def from_spec(self, model: nn.Module, layers: dict[str, dict]) -> None:
        cutting.select(model, layers["structure"]["rotary"])
        split = cutting.fuse(model)
        super().from_spec(model, layers)
        cutting.rejoin(model)
        fused_qkv.split(model, split)
