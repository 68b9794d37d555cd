"""Penalties on CRISP's mixers, which training may add to its loss (Tab. 4)."""

import torch
from torch import Tensor

from recombine.layers import SharedBasisLinear


def not_orthogonal(layer: SharedBasisLinear) -> Tensor:
    """How far a gated mixer G (r, s) is from orthogonal: |K - I|^2 / d.

    K (d, d) is G G^T, or G^T G if that is smaller, scaled to the trace d.
    """
    g = layer.gated_mixer()
    gram = g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g
    gram = gram / gram.diagonal().mean()
    return (gram - torch.eye(len(gram)).to(gram)).square().mean(1).sum()


PENALTIES = {
    "l2": lambda layer: layer.mixer.square().sum(),
    "orthogonal": not_orthogonal,
    "spectral": lambda layer: torch.linalg.matrix_norm(layer.mixer, 2),
}
