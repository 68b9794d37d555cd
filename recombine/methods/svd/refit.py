"""A second fit of low-rank layers to the inputs that compressed blocks give them, for SVD-LLM and Basis Sharing.

`refit=true` goes from block to block. M = E[x x^T] of a layer's inputs is measured with the blocks before it compressed
and its own block still dense. Of W' = left right, right stays and left is fitted to the dense layer's outputs,

    left' = argmin E|W x - left' right x|^2 = left + (W - left right) M right^T (right M right^T)^+,

where directions that M does not reach stay as they were. Every block takes one pass over the calibration batches.

That is SVD-LLM's local update. Paper: Basis Sharing's code takes one pass over the wholly compressed model, and one M
for a group, the sum over its layers. Here: this fit serves both, block after block.

`refit=anchored` aims at what the original model gives (anchored.py), and goes from input to input.
"""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor, nn

from recombine.core.calibration import Losses, collect
from recombine.core.drift import Moments, drifts
from recombine.core.memory import device_of
from recombine.core.method import Method, Site, need
from recombine.core.sites import block_of
from recombine.layers import FactoredLinear
from recombine.models import roles

WAYS = (False, True, "anchored")


def check_refit(method: Method, anchor: tuple[float, ...]) -> None:
    """Checks the fields `refit` and `anchor`.

    Raises:
        UsageError: one of them is out of range.
    """
    need(method.refit in WAYS, method, "refit", "must be false, true or anchored")
    good = len(anchor) == 2 and 0 <= anchor[0] <= anchor[1] <= 1
    need(good, method, "anchor", "must be the least and the largest share of the original, such as [1.0, 1.0]")


@torch.no_grad()
def anchored(
    method: Method,
    model: nn.Module,
    sites: list[Site],
    losses: Losses,
    fitted: Callable[[Site, Moments], FactoredLinear | None],
) -> None:
    """Puts factored layers into the model, in place, each fitted to inputs that the layers before it give.

    Args:
        fitted: the new layer; None: it stays dense.
    """
    store = method.memory.store(device_of(model), "hidden")
    for group, moments in drifts(model, sites, losses, store):
        for site in group:
            if (layer := fitted(site, moments[site.name])) is not None:
                method.kept.put(model, site.name, layer)


@torch.no_grad()
def refit(model: nn.Module, sites: list[Site], layers: dict[str, FactoredLinear], losses: Losses) -> None:
    """Puts the factored layers into the model, in place, with their left factors fitted again.

    Args:
        layers: of all sites, by site name.

    Raises:
        UsageError: no calibration batch reached a layer.
    """
    blocks = roles.block_names(model)
    for _, group in groupby(sites, key=lambda site: block_of(site.name, blocks)):
        group = list(group)
        stats = collect(model, group, losses, {"inputs"})
        for site in group:
            layer = layers[site.name]
            moment = stats.pop(site.name).inputs.xx
            layer.left.copy_(least_squares(site.module.weight, layer.left, layer.right, moment))
            model.set_submodule(site.name, layer)


def least_squares(weight: Tensor, left: Tensor, right: Tensor, moment: Tensor) -> Tensor:
    """left' (m, k) for weight (m, n), left (m, k), right (k, n) and M (n, n), in float64."""
    weight, left, right = (t.detach().double() for t in (weight, left, right))
    seen = right @ moment  # (k, n)
    inverse = torch.linalg.pinv(seen @ right.T, rtol=1e-12, hermitian=True)
    return left + (weight - left @ right) @ seen.T @ inverse
