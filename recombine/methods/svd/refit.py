"""A second fit of low-rank layers to the inputs that compressed blocks give them, for SVD-LLM and Basis Sharing.

It goes from block to block. M = E[x x^T] of a layer's inputs is measured with the blocks before it compressed and its
own block still dense. Of W' = left right, right stays and left is fitted to the dense layer's outputs,

    left' = argmin E|W x - left' right x|^2 = left + (W - left right) M right^T (right M right^T)^+,

where directions that M does not reach stay as they were. Every block takes one pass over the calibration batches.

That is SVD-LLM's local update. Paper: Basis Sharing's code takes one pass over the wholly compressed model, and one M
for a group, the sum over its layers. Here: this fit serves both, block after block.
"""

from itertools import groupby

import torch
from torch import Tensor, nn

from recombine.core.calibration import Losses, collect
from recombine.core.method import Site
from recombine.core.sites import block_of
from recombine.layers import FactoredLinear
from recombine.models import roles


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
