"""JACTUS's options for one layer (see method.py): every rank, and the dense layer, with cost and loss of each."""

from typing import NamedTuple

import torch
from torch import Tensor


class Prices(NamedTuple):
    """How the weights of a layer (m, n) are counted.

    Args:
        cores: the k^2 weights of a core count.
        dense: what a layer that stays dense trains, as in `Jactus.dense`: none, frozen, full or core_on_top_k.
        top_k: the size of the core that such a layer has under core_on_top_k.
        pivot: k^2 weights of a factored layer are those of an identity.
    """

    cores: bool
    dense: str
    top_k: int
    pivot: bool = False

    def factored(self, m: int, n: int, k: int) -> int:
        """Weights of the layer at rank k."""
        return k * (m + n) + k * k * (self.cores - self.pivot)

    def dense_cost(self, m: int, n: int, core: int) -> int:
        """Weights of the dense layer, with a core (core, core) beside it under core_on_top_k."""
        beside = self.dense == "core_on_top_k" and self.cores  # which has no pivots
        return m * n + (core * (m + n + core) if beside else 0)

    def max_rank(self, m: int, n: int) -> int:
        """The largest rank that stores less than the dense layer; min(m, n) where no layer may stay dense."""
        if self.dense == "none":
            return min(m, n)
        limit = self.dense_cost(m, n, self.top_k)
        return max(k for k in range(1, min(m, n) + 1) if k == 1 or self.factored(m, n, k) < limit)

    def options(self, m: int, n: int, gains: Tensor, width: int, relative: bool) -> tuple[Tensor, Tensor]:
        """Costs and losses, two tensors (options,), of the ranks 1, 2, ... and then of the dense layer.

        The dense layer is no option under dense=none.

        Args:
            gains: the L_j^2 of the layer's union, descending.
            width: the largest rank inside the union.
            relative: losses are shares of the gains' sum.
        """
        ranks = min(width, self.max_rank(m, n))
        tail = (gains.sum() - gains.cumsum(0))[:ranks].cpu()
        if relative:
            tail = tail / gains.sum().cpu().clamp(min=torch.finfo(tail.dtype).tiny)
        costs = [self.factored(m, n, k) for k in range(1, ranks + 1)]
        if self.dense != "none":
            costs.append(self.dense_cost(m, n, min(self.top_k, width)))
            tail = torch.cat([tail, tail.new_zeros(1)])
        return torch.tensor(costs), tail
