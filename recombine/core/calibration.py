"""Calibration: statistics of the target layers from one pass over a few batches.

Every statistic is a running sum in float64: at most one d x d matrix for a layer, never the activations. Layers that
read the same tensor (q, k and v of a block) share their input statistics. Tokens are pooled over batch and sequence.
Only non-padding tokens count, where the model is called with an `attention_mask` (B, T).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn

from recombine.errors import UsageError

Losses = Callable[[], Iterable[Tensor]]  # each call is a pass: one task loss, with its graph, per calibration batch

KINDS = {  # what a method can ask for -> the fields of Inputs and Stats that it fills
    "inputs": "xx, x4",
    "magnitudes": "absolute",
    "outputs": "gg, g4",
    "cross": "gx",
    "fisher": "fisher",
}
BACKWARD = {"outputs", "cross", "fisher"}  # need the loss's gradient


@dataclass
class Inputs:
    """Statistics of a layer's input x (n,), as means over tokens; sums while they are collected."""

    tokens: int = 0
    xx: Tensor | float = 0.0  # (n, n): E[x x^T]
    x4: float = 0.0  # E[|x|^4]
    absolute: Tensor | float = 0.0  # (n,): E[|x_j|]
    version: int = field(default_factory=count().__next__)  # no two are the same


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


def collect(model: nn.Module, sites, losses: Losses, wanted: set[str]) -> dict[str, Stats]:
    """Statistics of the target layers over all batches of `losses`, by site name.

    The model keeps its mode, its `requires_grad` flags and its gradients.

    Args:
        sites: target layers of the model, as `find_sites` gives them.
        losses: called once; yields one task loss per batch, with its graph.
        wanted: some of KINDS, such as {"inputs", "fisher"}.

    Raises:
        UsageError: no batch reached a layer, or a statistic is not finite.
    """
    assert wanted <= KINDS.keys(), wanted
    start = Inputs()
    stats = {site.name: Stats(inputs=start) for site in sites}
    backward = bool(wanted & BACKWARD)
    # what this batch's inputs, by identity, turned earlier sums into; the inputs are held, so that no id is used twice
    seen: dict[tuple[int, int], tuple[Tensor, Inputs]] = {}
    with capture_attention_mask(model) as mask, eval_frozen(model), torch.set_grad_enabled(backward):
        hooks = [
            site.module.register_forward_hook(statistics_hook(stats[site.name], wanted, mask, seen)) for site in sites
        ]
        try:
            for loss in losses():
                if backward:
                    loss.backward()
                for layer in stats.values():
                    end_batch(layer, wanted)
                seen.clear()
        finally:
            for hook in hooks:
                hook.remove()
    normalise(stats)
    return stats


def statistics_hook(stats: Stats, wanted: set[str], mask: list, seen: dict):
    """A forward hook that adds one batch to the statistics of a layer.

    Args:
        mask: the list of `capture_attention_mask`.
        seen: what `collect` knows of this batch's inputs; all hooks share it.
    """

    def hook(layer: nn.Module, args: tuple, y: Tensor):
        source, keep = args[0], valid(mask, args[0])
        x = tokens(source, keep)
        if wanted & {"inputs", "magnitudes"}:
            key = stats.inputs.version, id(source)  # the sums are shared for as long as the layers read the same
            if key not in seen:
                seen[key] = (source, add_inputs(stats.inputs, x, wanted))
            stats.inputs = seen[key][1]
        if not wanted & BACKWARD:
            return None
        if not y.requires_grad:  # all is frozen: the graph begins here
            y = y.detach().requires_grad_()

        def gradient(g: Tensor) -> None:
            g = tokens(g, keep)
            stats.tokens += len(g)
            if "outputs" in wanted:
                stats.gg = stats.gg + (g.T @ g).double()
                stats.g4 += g.double().square().sum(1).square().sum().item()
            if wanted & {"cross", "fisher"}:
                stats.batch = stats.batch + (g.T @ x).double()

        y.register_hook(gradient)
        return y

    return hook


def end_batch(stats: Stats, wanted: set[str]) -> None:
    """Adds the finished batch's dL/dW to the sums; a layer may be called more than once in a batch."""
    stats.batches += 1
    if "cross" in wanted:
        stats.gx = stats.gx + stats.batch
    if "fisher" in wanted and isinstance(stats.batch, Tensor):
        stats.fisher = stats.fisher + stats.batch.square()
    stats.batch = 0.0


def add_inputs(inputs: Inputs, x: Tensor, wanted: set[str]) -> Inputs:
    """New sums with the inputs x (tokens, n) added; the old ones stay as they are."""
    new = Inputs(inputs.tokens + len(x), inputs.xx, inputs.x4, inputs.absolute)
    if "inputs" in wanted:
        new.xx = new.xx + (x.T @ x).double()
        new.x4 += x.double().square().sum(1).square().sum().item()
    if "magnitudes" in wanted:
        new.absolute = new.absolute + x.abs().double().sum(0)
    return new


def tokens(x: Tensor, keep: Tensor | None) -> Tensor:
    """(..., d) -> (tokens, d), detached and at least float32. keep (B, T): the positions to take; None: all."""
    x = x.detach() if keep is None else x.detach()[keep]
    x = x.flatten(0, -2)
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def valid(mask: list, x: Tensor) -> Tensor | None:
    """The non-padding positions (B, T) of x (B, T, ...); None where the model got no mask of that shape."""
    keep = mask[0]
    return keep if keep is not None and x.shape[:2] == keep.shape else None


def passes(losses: Losses) -> Iterator[Tensor]:
    """The losses of batch after batch, pass after pass, without end.

    Raises:
        UsageError: a pass without a batch.
    """
    while True:
        loss = None
        for loss in losses():
            yield loss
        if loss is None:
            raise UsageError("calibration: a pass had no batch: losses() must begin anew and yield at least one")


@contextmanager
def capture_attention_mask(model: nn.Module):
    """Yields a one-element list that holds the attention mask (B, T) of the model's last call, or None."""
    mask: list[Tensor | None] = [None]

    def look(_, args, kwargs):
        given = kwargs.get("attention_mask")
        mask[0] = given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield mask
    finally:
        hook.remove()


@contextmanager
def eval_frozen(model: nn.Module):
    """Holds the model in eval mode with all parameters frozen while the block runs, then restores both."""
    modes = {module: module.training for module in model.modules()}
    trains = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p in trains:
            p.requires_grad_(True)


def normalise(stats: dict[str, Stats]) -> None:
    """Turns the sums into means, in place; input statistics that layers share are divided once.

    Raises:
        UsageError: no batch reached a layer, or a statistic is not finite.
    """
    for name, layer in stats.items():
        if not layer.inputs.tokens and not layer.tokens:
            raise UsageError(f"calibration: no batch reached {name}; give losses that yield at least one")
    for inputs in {id(layer.inputs): layer.inputs for layer in stats.values()}.values():
        count = max(inputs.tokens, 1)
        inputs.xx, inputs.x4, inputs.absolute = inputs.xx / count, inputs.x4 / count, inputs.absolute / count
    for name, layer in stats.items():
        count = max(layer.tokens, 1)
        layer.gg, layer.g4, layer.gx = layer.gg / count, layer.g4 / count, layer.gx / count
        layer.fisher = layer.fisher / max(layer.batches, 1)
        for value in (layer.inputs.xx, layer.inputs.absolute, layer.gg, layer.gx, layer.fisher):
            if isinstance(value, Tensor) and not value.isfinite().all():
                raise UsageError(f"calibration: the statistics of {name} are not finite; use float32 or other batches")
