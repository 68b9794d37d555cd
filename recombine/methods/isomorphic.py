"""Isomorphic pruning of a ViT: parts are ranked only against parts of the same form (arXiv 2407.04616).

A part is all that falls together, as torch-pruning's dependency graph finds it: an MLP's neuron (row of up, column of
down), a head or one of its dimensions (rows of q, k, v, column of o), a channel of the embedding (a row or a column of
every layer). It scores the mean, over its slices of weights, of sum |w dL/dw| with the loss's gradient summed over the
calibration batches; scores are divided by their mean in each block. Then the lowest share goes: of the neurons of all
blocks together, of all heads (the mean of their dimensions), of all head dimensions (the mean over heads, since all
heads of a block must stay alike) and of the embedding's channels. Every block keeps at least one of each. What stays is
an ordinary, smaller ViT; all of it trains in distillation.

Paper: the shares 0.5, 0.5 and 0.25 (of head dimensions) and rounding to even numbers. Here: the same shares, no
rounding, and for a budget all three scaled by one factor. torch-pruning leaves a block whole that would lose all of a
kind; here it keeps the best.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from recombine.calibration import Losses, quiet
from recombine.errors import UsageError
from recombine.methods.base import Site, need
from recombine.methods.pruning import Structural, comes_first
from recombine.models import roles
from recombine.models.split_qkv import fuse_qkv, split_qkv

STEP = 1000  # the common factor is a multiple of 1 / STEP


class Part(NamedTuple):
    """Slices of one kind in one place: the layer they are cut from first, how, and what each scores."""

    layer: nn.Module
    pruner: Callable
    score: Tensor  # (slices,)


class Kept(NamedTuple):
    """Indices of what stays: channels of the embedding, and for each block its neurons, heads and head dimensions."""

    channels: Tensor
    neurons: list[Tensor]
    heads: list[Tensor]
    dims: list[Tensor]

    def weights(self) -> int:
        """Of q, k, v, o, up and down."""
        inner = (4 * len(h) * len(d) + 2 * len(n) for n, h, d in zip(self.neurons, self.heads, self.dims, strict=True))
        return len(self.channels) * sum(inner)


@dataclass(kw_only=True)
class Isomorphic(Structural):
    """Args:
    ratio: share of the target layers' weights that is kept: the three shares below are scaled by the smallest common
        factor that leaves no more. None: they hold as they stand.
    channels: share that is cut of the MLPs' neurons and, with `width`, of the embedding's channels.
    heads: share of the heads that is cut.
    head_dims: share of the heads' dimensions that is cut.
    width: cut the embedding too, as the paper does; then block outputs of teacher and student cannot be compared.
    """

    targets: tuple[str, ...] = ("qkv", "o", "up", "down")
    ratio: float | None = None
    channels: float = 0.5
    heads: float = 0.5
    head_dims: float = 0.25
    width: bool = True

    knobs: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}
    judges: ClassVar[bool] = True

    def check(self, sites: list[Site]) -> None:
        if self.ratio is not None:
            need(0 < self.ratio <= 1, self, "ratio", "is a share of the weights, so it must lie in (0, 1]")
        for name in ("channels", "heads", "head_dims"):
            need(0 <= getattr(self, name) < 1, self, name, "is a share that is cut, so it must lie in [0, 1)")
        need(self.channels + self.heads + self.head_dims > 0, self, "channels", "one of the shares must be more than 0")
        named = {site.role for site in sites}
        whole = {"o", "up", "down"} <= named and ("qkv" in named or {"q", "k", "v"} <= named)
        need(whole, self, "targets", "whole blocks of linear layers are cut, and first: name qkv, o, up and down")
        up = [site.linear.out_features for site in sites if site.role == "up"]
        down = [site.linear.in_features for site in sites if site.role == "down"]
        need(up == down, self, "targets", "up is not as wide as down here: gate and up are in one layer")

    def prepare(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        import torch_pruning as tp

        comes_first(self, model)
        self.forms = [(a.num_heads, a.head_dim) for a in attentions(model)]
        if losses is None:
            raise UsageError("Isomorphic calibrates: give apply(..., losses=), which yields a task loss per batch")
        self.split = fuse_qkv(model)  # until `rewrite` is done
        o, up = ([site.linear for site in sites if site.role == role] for role in ("o", "up"))
        embed = model.get_submodule(next(iter(roles.find(model, ("embed",), nn.Conv2d))))
        size = model.patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
        importance = tp.importance.GroupTaylorImportance()
        with gradients(model, losses):
            image = embed.weight.new_zeros(1, embed.in_channels, *size)
            self.graph = tp.DependencyGraph().build_dependency(model, example_inputs=image, verbose=False)

            def part(layer: nn.Module, pruner: Callable, count: int) -> Part:
                score = importance(self.graph.get_pruning_group(layer, pruner, list(range(count))))
                return Part(layer, pruner, score.nan_to_num(0.0).cpu())  # where no gradient comes the mean is 0

            self.stem = part(embed, tp.prune_conv_out_channels, embed.out_channels)
            self.mlps = [part(linear, tp.prune_linear_out_channels, linear.out_features) for linear in up]
            self.attentions = [part(linear, tp.prune_linear_in_channels, linear.in_features) for linear in o]
        if self.ratio is not None:
            least = self.ranked(self.most).weights() / dense(sites)
            need(self.ratio >= least, self, "ratio", f"must be at least {least:.5f}, where one of each kind is left")

    def choices(self, knob: str, sites: list[Site]) -> list[float]:
        return [i / 1000 for i in range(1, 1001)]

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        return self.plan(sites).weights(), 0

    def plan(self, sites: list[Site]) -> Kept:
        if self.ratio is None:
            return self.ranked(STEP)
        low, high = -1, self.most  # low keeps too much
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.ranked(middle).weights() <= self.ratio * dense(sites)
            low, high = (low, middle) if fits else (middle, high)
        return self.ranked(high)

    @property
    def most(self) -> int:
        """The factor at which the last of the three shares is 1."""
        return math.ceil(STEP / min(share for share in (self.channels, self.heads, self.head_dims) if share))

    def ranked(self, factor: int) -> Kept:
        """What stays when the shares are scaled by factor / STEP."""
        channels, heads, dims = (min(1.0, factor / STEP * s) for s in (self.channels, self.heads, self.head_dims))
        # (heads, head_dims)
        scores = [part.score.view(form) for part, form in zip(self.attentions, self.forms, strict=True)]
        return Kept(
            best([self.stem.score], channels if self.width else 0.0)[0],
            best([part.score for part in self.mlps], channels),
            best([score.mean(1) for score in scores], heads),
            best([score.mean(0) for score in scores], dims),
        )

    def prune(self, model: nn.Module, sites: list[Site]) -> None:
        kept = self.plan(sites)
        inner = [
            (heads[:, None] * form[1] + dims).flatten()
            for heads, dims, form in zip(kept.heads, kept.dims, self.forms, strict=True)
        ]
        parts = [self.stem, *self.mlps, *self.attentions]
        for part, stay in zip(parts, [kept.channels, *kept.neurons, *inner], strict=True):
            if gone := sorted(set(range(len(part.score))) - set(stay.tolist())):
                self.graph.get_pruning_group(part.layer, part.pruner, gone).prune()
        for attention, heads, dims in zip(attentions(model), kept.heads, kept.dims, strict=True):
            attention.num_heads, attention.head_dim = len(heads), len(dims)
            attention.attn_dim, attention.scale = len(heads) * len(dims), len(dims) ** -0.5
        model.requires_grad_(False)  # torch-pruning's parameters are new
        model.embed_dim = model.num_features = model.head_hidden_size = len(kept.channels)

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        super().rewrite(model, sites)
        split_qkv(model, self.split)

    def restore(self, model: nn.Module, layers: dict[str, dict]) -> None:
        split = fuse_qkv(model)  # the description is of fused layers
        super().restore(model, layers)
        split_qkv(model, split)


def dense(sites: list[Site]) -> int:
    return sum(site.linear.weight.numel() for site in sites)


def attentions(model: nn.Module) -> list[Attention]:
    """The attention of every block."""
    owners = [name.rpartition(".")[0] for name in roles.find(model, ("o",), nn.Module)]
    found = [model.get_submodule(name) for name in owners]
    # beside qkv and o, a norm of q and k or a gate would hold weights: what torch-pruning finds would not do
    plain = all(type(a) is Attention and sum(map(has_weights, a.children())) == 2 for a in found)
    if not plain or has_weights(getattr(model, "attn_pool", None) or nn.Identity()):
        kind = f"{type(model).__name__} with {type(found[0]).__name__}"
        raise UsageError(f"Isomorphic prunes timm's plain ViT only, not {kind}: take another compressor")
    return found


def has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def best(scores: list[Tensor], share: float) -> list[Tensor]:
    """Ranks all places' scores together and drops the lowest share; the indices that stay, at least one in each."""
    lengths = [len(score) for score in scores]
    everything = torch.cat(scores)
    stays = torch.ones(len(everything), dtype=torch.bool)
    stays[everything.argsort(stable=True)[: len(everything) - int(len(everything) * (1 - share) + 1e-9)]] = False
    for score, place in zip(scores, stays.split(lengths), strict=True):
        place[score.argmax()] = True
    return [place.nonzero().flatten() for place in stays.split(lengths)]


@contextmanager
def gradients(model: nn.Module, losses: Losses) -> Iterator[None]:
    """The loss's gradients, summed over the batches, are in the parameters for as long as the block runs."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with quiet(model), torch.enable_grad():
            model.requires_grad_(True).zero_grad()
            for loss in losses():
                loss.backward()
            found = [p.grad for p in model.parameters() if p.grad is not None]
            if not found or not all(grad.isfinite().all() for grad in found):
                raise UsageError(
                    "Isomorphic: losses= gave this model no finite gradient: use its own loss, other batches"
                )
            yield
    finally:
        model.zero_grad()
        for p, flag in flags:
            p.requires_grad_(flag)
