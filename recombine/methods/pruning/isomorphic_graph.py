"""The parts of a ViT that must be cut together, and their scores (see isomorphic.py)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from recombine.core.calibration import Losses, eval_frozen, need_graph
from recombine.core.method import Site
from recombine.errors import UsageError
from recombine.models import roles


class Part(NamedTuple):
    """Slices of one form in one place: the layer they are cut from first, torch-pruning's way to cut it, the scores."""

    layer: nn.Module
    pruner: Callable
    score: Tensor  # (slices,)


class Kept(NamedTuple):
    """Indices of what stays: channels of the embedding; neurons, heads and head dimensions of each block."""

    channels: Tensor
    neurons: list[Tensor]
    heads: list[Tensor]
    dims: list[Tensor]

    def weights(self) -> int:
        """Weights that are left of q, k, v, o, up and down."""
        inner = (4 * len(h) * len(d) + 2 * len(n) for n, h, d in zip(self.neurons, self.heads, self.dims, strict=True))
        return len(self.channels) * sum(inner)


class Parts(NamedTuple):
    """All parts of a model, in torch-pruning's graph of it."""

    graph: Any
    stem: Part  # the embedding's channels
    mlps: list[Part]  # of each block: its neurons
    attentions: list[Part]  # of each block: the dimensions of all its heads
    forms: list[tuple[int, int]]  # of each block: heads, dimensions of a head

    def ranked(self, width: float, neurons: float, heads: float, dims: float, multiple: int) -> Kept:
        """What stays when the lowest shares are cut.

        Args:
            width: share of the embedding's channels that is cut.
            neurons, heads, dims: shares of the blocks' neurons, heads and head dimensions that are cut.
            multiple: of channels, neurons and head dimensions a multiple of this stays.
        """
        # (heads, dimensions of a head)
        scores = [part.score.view(form) for part, form in zip(self.attentions, self.forms, strict=True)]
        return Kept(
            best([self.stem.score], width, multiple)[0],
            best([part.score for part in self.mlps], neurons, multiple),
            best([score.mean(1) for score in scores], heads),
            best([score.mean(0) for score in scores], dims, multiple),
        )

    def inner(self, kept: Kept) -> list[Tensor]:
        """The inputs of each block's o that stay."""
        return [
            (heads[:, None] * form[1] + dims).flatten()
            for heads, dims, form in zip(kept.heads, kept.dims, self.forms, strict=True)
        ]

    def prune(self, kept: Kept) -> None:
        """Cuts everything else out of the layers, in place."""
        parts = [self.stem, *self.mlps, *self.attentions]
        for part, stay in zip(parts, [kept.channels, *kept.neurons, *self.inner(kept)], strict=True):
            if gone := sorted(set(range(len(part.score))) - set(stay.tolist())):
                self.graph.get_pruning_group(part.layer, part.pruner, gone).prune()


def find_parts(model: nn.Module, sites: list[Site], losses: Losses) -> Parts:
    """The parts of a ViT, with their scores on the calibration batches.

    Args:
        model: whose qkv are fused layers.

    Raises:
        UsageError: the model is no plain timm ViT, or the losses give it no finite gradient.
    """
    import torch_pruning as tp

    o, up = ([site.module for site in sites if site.role == role] for role in ("o", "up"))
    embed = model.get_submodule(next(iter(roles.find(model, ("embed",), nn.Conv2d))))
    size = model.patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
    importance = tp.importance.GroupTaylorImportance()
    with gradients(model, losses):
        image = embed.weight.new_zeros(1, embed.in_channels, *size)
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=image, verbose=False)

        def part(layer: nn.Module, pruner: Callable, count: int) -> Part:
            score = importance(graph.get_pruning_group(layer, pruner, list(range(count))))
            if score.is_meta:  # of a plan: all places alike
                return Part(layer, pruner, torch.arange(count, device="cpu") / count)
            return Part(layer, pruner, score.nan_to_num(0.0).cpu())  # where no gradient comes the mean is 0

        return Parts(
            graph,
            part(embed, tp.prune_conv_out_channels, embed.out_channels),
            [part(linear, tp.prune_linear_out_channels, linear.out_features) for linear in up],
            [part(linear, tp.prune_linear_in_channels, linear.in_features) for linear in o],
            [(a.num_heads, a.head_dim) for a in attentions(model)],
        )


def attentions(model: nn.Module) -> list[Attention]:
    """The attention module of every block.

    Raises:
        UsageError: the model is not timm's plain ViT.
    """
    owners = [name.rpartition(".")[0] for name in roles.find(model, ("o",), nn.Module)]
    layers = [model.get_submodule(name) for name in owners]
    # beside qkv and o, a norm of q and k or a gate would hold weights: what torch-pruning finds would not do
    plain = all(type(a) is Attention and sum(map(has_weights, a.children())) == 2 for a in layers)
    if not plain or has_weights(getattr(model, "attn_pool", None) or nn.Identity()):
        kind = f"{type(model).__name__} with {type(layers[0]).__name__}"
        raise UsageError(f"Isomorphic prunes timm's plain ViT only, not {kind}: take another compressor")
    return layers


def has_weights(module: nn.Module) -> bool:
    """Whether the module has any parameter."""
    return next(module.parameters(), None) is not None


def best(scores: list[Tensor], share: float, multiple: int = 1) -> list[Tensor]:
    """Ranks the scores of all places together and drops the lowest share.

    Args:
        scores: of each place, (slices,).
        share: that is dropped, in [0, 1].
        multiple: further slices go, until a place that has more than this left has a multiple of it.

    Returns:
        The indices that stay in each place, at least one.
    """
    lengths = [len(score) for score in scores]
    everything = torch.cat(scores)
    stays = torch.ones(len(everything), dtype=torch.bool)
    stays[everything.argsort(stable=True)[: len(everything) - int(len(everything) * (1 - share) + 1e-9)]] = False
    for score, place in zip(scores, stays.split(lengths), strict=True):
        place[score.argmax()] = True
        left = place.nonzero().flatten()
        if len(left) > multiple:
            place[left[score[left].argsort(stable=True)[: len(left) % multiple]]] = False
    return [place.nonzero().flatten() for place in stays.split(lengths)]


@contextmanager
def gradients(model: nn.Module, losses: Losses) -> Iterator[None]:
    """Holds the loss's gradients, summed over the batches, in the parameters while the block runs.

    Raises:
        UsageError: there is no gradient, or one is not finite.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with eval_frozen(model), torch.enable_grad():
            model.requires_grad_(True).zero_grad()
            for loss in losses():
                need_graph(loss).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            if not grads or not all(grad.isfinite().all() for grad in grads):
                raise UsageError(
                    "Isomorphic: losses= gave this model no finite gradient: use its own loss, other batches"
                )
            yield
    finally:
        model.zero_grad()
        for p, flag in flags:
            p.requires_grad_(flag)
