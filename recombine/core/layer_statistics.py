"""The running sums of one layer's inputs and gradients, and the hook that adds a batch to them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from weakref import ref

import torch
from torch import Tensor, nn

KINDS = {  # what a method can ask for -> the fields of Inputs and Stats that it fills
    "inputs": "xx, x4",
    "mean": "mean",
    "magnitudes": "absolute",
    "outputs": "gg, g4",
    "clipped": "none; the gradients of outputs are clipped",
    "cross": "gx",
    "fisher": "fisher",
}
BACKWARD = {"outputs", "cross", "fisher"}  # need the loss's gradient


LEAST, MOST = 0.1, 10.0  # of a clipped gradient's norm, as shares of the mean norm of its sequence
VERSIONS = count()
PIECE = 2**20  # entries that are converted at once
WIDE = 1024  # of a Gram matrix from here on only the upper half is computed, which takes 0.6 of the time
STRIPE = 384  # its rows at once


@dataclass(eq=False)
class Inputs:
    """Statistics of a layer's input x (n,), as means over tokens; sums while they are collected."""

    tokens: int = 0
    xx: Tensor | float = 0.0  # (n, n): E[x x^T]
    x4: float = 0.0  # E[|x|^4]
    mean: Tensor | float = 0.0  # (n,): E[x]
    absolute: Tensor | float = 0.0  # (n,): E[|x_j|]
    layers: int = 1  # how many hold it
    version: int = field(default_factory=VERSIONS.__next__)  # of these sums; no two are the same


@dataclass
class Stats:
    """Statistics of one layer y = W x, W (m, n), with g = dL/dy (m,); sums while they are collected.

    All are means over tokens, but `fisher`, which is a mean over batches.
    """

    inputs: Inputs = field(default_factory=Inputs)
    tokens: int = 0
    batches: int = 0
    gg: Tensor | float = 0.0  # (m, m): E[g g^T]
    g4: float = 0.0  # E[|g|^4]
    gx: Tensor | float = 0.0  # (m, n): E[g x^T]
    fisher: Tensor | float = 0.0  # (m, n): E[(dL/dW)^2]
    batch: Tensor | float = 0.0  # (m, n): dL/dW of the batch under way
    calls: int = 0  # how often the layer was called


class Watched(torch.autograd.Function):
    """A layer's output y as it is, with `see` called on its gradient: see(dL/dy).

    y counts as written to. So the gradient is seen although an activation writes over y afterwards, and y is not
    copied. anchor is any scalar that requires a gradient.
    """

    @staticmethod
    def forward(ctx, y: Tensor, anchor: Tensor, see: Callable[[Tensor], None]) -> Tensor:
        """y itself."""
        ctx.mark_dirty(y)
        ctx.see = see
        return y

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        """g goes on to y."""
        ctx.see(g)
        return g, None, None


def statistics_hook(stats: Stats, wanted: set[str], mask: list, seen: dict, anchor: Tensor):
    """A forward hook that adds one batch to the statistics of a layer.

    Args:
        mask: the list of `capture_attention_mask`.
        seen: what `collect` knows of this batch's inputs; all hooks share it.
        anchor: of `Watched`.
    """

    def hook(layer: nn.Module, args: tuple, y: Tensor):
        stats.calls += 1
        source, keep = args[0], valid(mask, args[0])
        if wanted & {"inputs", "mean", "magnitudes"}:
            key = stats.inputs.version, id(source)  # the sums are shared for as long as the layers read the same
            if key not in seen or seen[key][0]() is not source:
                seen[key] = (ref(source), add_inputs(stats.inputs, tokens(source, keep), wanted))
            else:
                stats.inputs.layers -= 1
                seen[key][1].layers += 1
            stats.inputs = seen[key][1]
        if not wanted & BACKWARD:
            return None
        source = source if wanted & {"cross", "fisher"} else None  # nothing else holds it until the backward pass

        def gradient(g: Tensor) -> None:
            weighed = tokens(clipped(g.detach(), keep), keep) if "clipped" in wanted else None
            g = tokens(g, keep)
            stats.tokens += len(g)
            if "outputs" in wanted:
                weighed = g if weighed is None else weighed
                stats.gg = gram_added(stats.gg, weighed)
                stats.g4 += weighed.double().square().sum(1).square().sum().item()
            if source is not None:
                stats.batch = added(stats.batch, g.T @ tokens(source, keep))

        return Watched.apply(y if y.requires_grad else y.detach(), anchor, gradient)

    return hook


def end_batch(stats: Stats, wanted: set[str]) -> None:
    """Adds the finished batch's dL/dW to the sums; a layer may be called more than once in a batch."""
    stats.batches += 1
    if not isinstance(stats.batch, Tensor):
        return
    if "cross" in wanted:
        stats.gx = added(stats.gx, stats.batch)
    if "fisher" in wanted:
        stats.fisher = added(stats.fisher, stats.batch.square())
    stats.batch = 0.0


def add_inputs(inputs: Inputs, x: Tensor, wanted: set[str]) -> Inputs:
    """The sums with the inputs x (tokens, n) added: the same ones, or new ones where other layers hold these."""
    if inputs.layers > 1:
        inputs.layers -= 1
        copies = {k: v.clone() for k in ("xx", "mean", "absolute") if isinstance(v := getattr(inputs, k), Tensor)}
        inputs = replace(inputs, layers=1, **copies)
    inputs.version = next(VERSIONS)
    inputs.tokens += len(x)
    if "inputs" in wanted:
        inputs.xx = gram_added(inputs.xx, x)
        inputs.x4 += x.double().square().sum(1).square().sum().item()
    if "mean" in wanted:
        inputs.mean = added(inputs.mean, x.double().sum(0))
    if "magnitudes" in wanted:
        inputs.absolute = added(inputs.absolute, x.abs().double().sum(0))
    return inputs


def added(total: Tensor | float, term: Tensor) -> Tensor:
    """total + term in float64, in the memory of `total`; a term of float64 may become the total."""
    if not isinstance(total, Tensor):
        return term.double()
    rows = len(term) if term.is_meta else max(1, PIECE // (term.numel() // len(term)))  # one operation of a plan
    for into, piece in zip(total.split(rows), term.split(rows), strict=True):
        into += piece  # no whole copy of the term in float64
    return total


def gram_added(total: Tensor | float, x: Tensor) -> Tensor:
    """total + x^T x in float64, in the memory of `total`, for x (tokens, n). Of a wide one the upper half alone."""
    n = x.shape[1]
    if n < WIDE or x.is_meta:
        return added(total, x.T @ x)
    if not isinstance(total, Tensor):
        total = x.new_zeros(n, n, dtype=torch.float64)
    for i in range(0, n, STRIPE):
        total[i : i + STRIPE, i:] += x[:, i : i + STRIPE].T @ x[:, i:]
    return total


def mirrored(total: Tensor | float) -> Tensor | float:
    """The sum of `gram_added` with its lower half, in its memory."""
    if isinstance(total, Tensor) and len(total) >= WIDE and not total.is_meta:
        for i in range(0, len(total), STRIPE):
            total[i + STRIPE :, i : i + STRIPE] = total[i : i + STRIPE, i + STRIPE :].T
    return total


def clipped(g: Tensor, keep: Tensor | None) -> Tensor:
    """Gradients (B, ..., m) scaled to norms from LEAST to MOST times the mean norm of their sequence.

    A sequence is what has one place along the first dimension. A gradient of 0 stays 0, and the mean leaves it out: in
    the last block of a ViT only the class token has one. keep: as in `tokens`.
    """
    if g.ndim == 2:  # a sequence is one token
        return g
    g = g if g.dtype in (torch.float32, torch.float64) else g.float()
    norm = g.norm(dim=-1, keepdim=True)
    counted = torch.ones_like(norm) if keep is None else keep[(..., *[None] * (norm.ndim - 2))].expand_as(norm)
    counted = counted * (norm > 0)
    inner = tuple(range(1, g.ndim - 1))
    mean = (norm * counted).sum(inner, keepdim=True) / counted.sum(inner, keepdim=True).clamp(min=1)
    return torch.where(norm > 0, g * (norm.clamp(LEAST * mean, MOST * mean) / norm), 0.0)


def tokens(x: Tensor, keep: Tensor | None) -> Tensor:
    """(..., d) -> (tokens, d), detached and at least float32. keep (B, T): the positions to take; None: all."""
    x = x.detach() if keep is None else x.detach()[keep]
    x = x.flatten(0, -2)
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def valid(mask: list, x: Tensor) -> Tensor | None:
    """The non-padding positions (B, T) of x (B, T, ...); None where the model got no mask of that shape."""
    keep = mask[0]
    return keep if keep is not None and x.shape[:2] == keep.shape else None
