"""Isomorphic pruning of a ViT: parts are ranked only against parts of the same form (arXiv 2407.04616).

A part is all that falls together, as torch-pruning's dependency graph finds it: an MLP's neuron (row of up, column of
down), a head or one of its dimensions (rows of q, k, v, column of o), a channel of the embedding (a row or a column of
every layer). It scores the mean, over its slices of weights, of sum |w dL/dw| with the loss's gradient summed over the
calibration batches; scores are divided by their mean in each block. Then the lowest share goes: of the neurons of all
blocks together, of all heads (the mean of their dimensions), of all head dimensions (the mean over heads, since all
heads of a block must stay alike) and of the embedding's channels. Every block keeps at least one of each. What stays is
an ordinary, smaller ViT; all of it trains in distillation.

Paper: the shares 0.5, 0.5 and 0.25 (of head dimensions), rounded to even numbers (`round_to=2`). Here: the same
shares, no rounding, and for a budget all three scaled by one factor. torch-pruning leaves a block whole that would lose
all of a kind; here it keeps the best.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from recombine.core.calibration import Losses
from recombine.core.method import Site, need, need_losses
from recombine.methods.pruning.base import Structural, comes_first
from recombine.methods.pruning.isomorphic_graph import Kept, attentions, find_parts
from recombine.models import fused_qkv

STEP = 1000  # the common factor is a multiple of 1 / STEP


@dataclass(kw_only=True)
class Isomorphic(Structural):
    """Args:
    ratio: share of the target layers' weights that is kept: the three shares below are scaled by the smallest common
        factor that leaves no more. None: they hold as they stand.
    channels: share that is cut of the MLPs' neurons and, with `width`, of the embedding's channels.
    heads: share of the heads that is cut.
    head_dims: share of the heads' dimensions that is cut.
    round_to: of neurons, head dimensions and channels a multiple of this stays, the next lower one.
    width: cut the embedding too, as the paper does; then block outputs of teacher and student cannot be compared.
    """

    targets: tuple[str, ...] = ("qkv", "o", "up", "down")
    ratio: float | None = None
    channels: float = 0.5
    heads: float = 0.5
    head_dims: float = 0.25
    round_to: int = 1
    width: bool = True

    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}
    needs_trained_head: ClassVar[bool] = True

    def check(self, sites: list[Site]) -> None:
        if self.ratio is not None:
            need(0 < self.ratio <= 1, self, "ratio", "is a share of the weights, so it must lie in (0, 1]")
        for name in ("channels", "heads", "head_dims"):
            need(0 <= getattr(self, name) < 1, self, name, "is a share that is cut, so it must lie in [0, 1)")
        need(self.channels + self.heads + self.head_dims > 0, self, "channels", "one of the shares must be more than 0")
        need(self.round_to >= 1, self, "round_to", "must be at least 1")
        named = {site.role for site in sites}
        whole = {"o", "up", "down"} <= named and ("qkv" in named or {"q", "k", "v"} <= named)
        need(whole, self, "targets", "whole blocks of linear layers are cut, and first: name qkv, o, up and down")
        up = [site.module.out_features for site in sites if site.role == "up"]
        down = [site.module.in_features for site in sites if site.role == "down"]
        need(up == down, self, "targets", "up is not as wide as down here: gate and up are in one layer")

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
        """The factor at which the last of the three shares is 1."""
        return math.ceil(STEP / min(share for share in (self.channels, self.heads, self.head_dims) if share))

    def ranked(self, factor: int) -> Kept:
        """What stays when the shares are scaled by factor / STEP."""
        channels, heads, dims = (min(1.0, factor / STEP * s) for s in (self.channels, self.heads, self.head_dims))
        return self.parts.ranked(channels if self.width else 0.0, channels, heads, dims, self.round_to)

    def prune(self, model: nn.Module, sites: list[Site]) -> None:
        kept = self.plan(sites)
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
    return sum(site.module.weight.numel() for site in sites)
