"""JACTUS's choices for one layer (see jactus.py): every rank, or the dense layer, with what it costs and loses."""

from typing import NamedTuple

import torch
from torch import Tensor


class Prices(NamedTuple):
    """How a layer (m, n) is counted.

    cores: the k^2 of a core count. dense: the rule for layers that stay dense, as in `Jactus.dense`. top_k: the size of
    the core that such a layer has under core_on_top_k.
    """

    cores: bool
    dense: str
    top_k: int

    def factored(self, m: int, n: int, k: int) -> int:
        return k * (m + n) + (k * k if self.cores else 0)

    def dense_cost(self, m: int, n: int, core: int) -> int:
        """Of the dense layer with a core of that size beside it."""
        return m * n + (self.factored(m, n, core) if self.dense == "core_on_top_k" and self.cores else 0)

    def max_rank(self, m: int, n: int) -> int:
        """The largest rank that is worth its weights."""
        if self.dense == "none":
            return min(m, n)
        limit = self.dense_cost(m, n, self.top_k)
        return max(k for k in range(1, min(m, n) + 1) if k == 1 or self.factored(m, n, k) < limit)

    def options(self, m: int, n: int, gains: Tensor, width: int, relative: bool) -> tuple[Tensor, Tensor]:
        """Costs and losses of the ranks 1, 2, ... and, unless the rule is none, of the dense layer, which comes last.

        gains: the L_j^2 of the layer's union. width: the largest rank inside the union. relative: losses as shares.
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
