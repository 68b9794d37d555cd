"""Isomorphic pruning of a ViT: parts are ranked only against parts of the same form (arXiv 2407.04616).

A part is everything that must be cut together, as torch-pruning's dependency graph finds it. There are four forms: an
MLP's neuron (a row of up, a column of down); a head, or one of its dimensions (rows of q, k, v, columns of o); a
channel of the embedding (a row or a column of every layer). A part's score is the mean, over its slices of weights, of
sum |w dL/dw|, with the gradient summed over the calibration batches. Scores are divided by their mean in each block.

The lowest share of each form is cut, over all blocks together. A head scores the mean of its dimensions. A head
dimension scores the mean over the heads of its block, since these must stay alike. Every block keeps at least one part
of each form. What stays is an ordinary, smaller ViT, all of which trains in distillation.

Paper: the shares are 0.5, 0.5 and 0.25 (of head dimensions), rounded to even numbers (`round_to=2`). Here: the same
shares without rounding; a budget scales all three by one factor.
Paper's library, torch-pruning: a block that would lose all parts of a form stays whole. Here: it keeps the best one.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from recombine.core.calibration import Losses
from recombine.core.method import Site, need, need_losses
from recombine.methods.pruning.base import Structural, comes_first
from recombine.methods.pruning.compensation import RIDGE, Moments, compensated
from recombine.methods.pruning.isomorphic_graph import Kept, attentions, find_parts
from recombine.models import fused_qkv

STEP = 1000  # the common factor is a multiple of 1 / STEP


@dataclass(kw_only=True)
class Isomorphic(Structural):
    """Cuts neurons, heads, head dimensions and channels of a ViT, each ranked by form (arXiv 2407.04616).

    Args:
        ratio: share of the target layers' weights that is kept. The three shares below are scaled by the smallest
            common factor that leaves no more. None: they hold as they stand.
        channels: share that is cut of the MLPs' neurons and, with `width`, of the embedding's channels.
        heads: share of the heads that is cut.
        head_dims: share of the heads' dimensions that is cut.
        round_to: the number of neurons, head dimensions or channels that stays is rounded down to a multiple of this.
        width: cut the embedding too, as the paper does. Block outputs of teacher and student then differ in width, so
            a distillation cannot compare them.
        compensate: none; or ridge, down and o make up for the neurons and heads that are cut (`compensation.py`).
        as_paper: fields that have their default take those of the paper, which `paper` names.
    """

    targets: tuple[str, ...] = ("qkv", "o", "up", "down")
    ratio: float | None = None
    channels: float = 0.5
    heads: float = 0.5
    head_dims: float = 0.25
    round_to: int = 1
    width: bool = True
    compensate: str = "none"
    as_paper: bool = False

    paper: ClassVar[dict[str, Any]] = {"round_to": 2}
    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}
    needs_trained_head: ClassVar[bool] = True

    def check(self, sites: list[Site]) -> None:
        if self.ratio is not None:
            need(0 < self.ratio <= 1, self, "ratio", "is a share of the weights, so it must lie in (0, 1]")
        for name in ("channels", "heads", "head_dims"):
            need(0 <= getattr(self, name) < 1, self, name, "is a share that is cut, so it must lie in [0, 1)")
        need(self.channels + self.heads + self.head_dims > 0, self, "channels", "one of the shares must be more than 0")
        need(self.round_to >= 1, self, "round_to", "must be at least 1")
        need(self.compensate in ("none", "ridge"), self, "compensate", "must be none or ridge")
        named = {site.role for site in sites}
        whole = {"o", "up", "down"} <= named and ("qkv" in named or {"q", "k", "v"} <= named)
        need(whole, self, "targets", "whole blocks of linear layers are cut, and first: name qkv, o, up and down")
        up = [site.module.out_features for site in sites if site.role == "up"]
        down = [site.module.in_features for site in sites if site.role == "down"]
        need(up == down, self, "targets", "up is not as wide as down here: gate and up are in one layer")

    def statistics_needed(self) -> set[str]:
        return set() if self.compensate == "none" else {"inputs", "mean"}

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        """Each layer by itself that reads what is compensated."""
        return [[site] for site in sites if site.role in ("o", "down")]

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """The moments of a layer's input: what is cut is not known yet."""
        inputs = self.stats[group[0].name].inputs
        return {"second": inputs.xx, "mean": inputs.mean}

    def fold(self, sites: list[Site], kept: Kept) -> None:
        """Writes into every o and down, in place, what they need once their other inputs are cut."""
        stay = {"o": iter(self.parts.inner(kept)), "down": iter(kept.neurons)}
        for site in sites:
            if site.role in stay and len(inputs := next(stay[site.role])) < site.module.in_features:
                found, layer = self.digested([site]), site.module
                moments = Moments(found["second"], found["mean"])
                weight, bias = compensated(layer.weight, layer.bias, moments, inputs, RIDGE)
                whole = layer.weight.detach().clone()
                whole[:, inputs] = weight.to(whole)
                layer.weight.data = whole  # torch-pruning's graph knows the parameter
                if bias is not None:
                    layer.bias.data = bias.to(layer.bias)

    def before_budget(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        comes_first(self, model)
        attentions(model)  # refuses what it does not know
        need_losses(self, losses)
        self.split = fused_qkv.fuse(model)  # until `rewrite` is done
        self.parts = find_parts(model, sites, losses)
        if self.ratio is not None:
            least = self.ranked(self.largest_factor).weights() / dense(sites)
            need(self.ratio >= least, self, "ratio", f"must be at least {least:.5f}, where one of each kind is left")

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        return [i / 1000 for i in range(1, 1001)]

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        return self.plan(sites).weights(), 0

    def plan(self, sites: list[Site]) -> Kept:
        """What stays, by `ratio` or by the shares as they stand."""
        if self.ratio is None:
            return self.ranked(STEP)
        low, high = -1, self.largest_factor  # low keeps too much
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.ranked(middle).weights() <= self.ratio * dense(sites)
            low, high = (low, middle) if fits else (middle, high)
        return self.ranked(high)

    @property
    def largest_factor(self) -> int:
        """The factor, in units of 1 / STEP, at which the smallest of the three shares reaches 1."""
        return math.ceil(STEP / min(share for share in (self.channels, self.heads, self.head_dims) if share))

    def ranked(self, factor: int) -> Kept:
        """What stays when the shares are scaled by factor / STEP."""
        channels, heads, dims = (min(1.0, factor / STEP * s) for s in (self.channels, self.heads, self.head_dims))
        return self.parts.ranked(channels if self.width else 0.0, channels, heads, dims, self.round_to)

    def prune(self, model: nn.Module, sites: list[Site]) -> None:
        kept = self.plan(sites)
        if self.compensate == "ridge":
            self.fold(sites, kept)
        self.parts.prune(kept)
        for attention, heads, dims in zip(attentions(model), kept.heads, kept.dims, strict=True):
            attention.num_heads, attention.head_dim = len(heads), len(dims)
            attention.attn_dim, attention.scale = len(heads) * len(dims), len(dims) ** -0.5
        model.requires_grad_(False)  # torch-pruning's parameters are new
        model.embed_dim = model.num_features = model.head_hidden_size = len(kept.channels)

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        super().rewrite(model, sites)
        fused_qkv.split(model, self.split)

    def from_spec(self, model: nn.Module, layers: dict[str, dict]) -> None:
        parts = fused_qkv.fuse(model)  # the description is of fused layers
        super().from_spec(model, layers)
        fused_qkv.split(model, parts)


def dense(sites: list[Site]) -> int:
    """Weights of the target layers as they are."""
    return sum(site.module.weight.numel() for site in sites)
