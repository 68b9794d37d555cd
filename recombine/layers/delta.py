"""W = keep . base + scale . left . core . right + scatter(entries): an adapter beside a frozen base weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recombine.layers.base import RecombinedLinear, frozen
from recombine.layers.packed import linear


class DeltaLinear(RecombinedLinear):
    """A base weight with a low-rank and a sparse delta: y = (keep W + scale left core right + S) x + bias.

    keep is the scalar buffer `keep_base`: 1, unless a schedule fades the base weight out. All tensors start frozen.

    Args:
        weight: W (m, n), the base weight.
        left, right: (m, r) and (r, n); None, both: no low-rank delta.
        entries, index: S is zero but for entries (e,) at the flat positions index (e,) of W; None, both: no S.
        core: (r, r); None: the identity.
    """

    def __init__(
        self,
        weight: Tensor,
        left: Tensor | None = None,
        right: Tensor | None = None,
        scale: float = 1.0,
        entries: Tensor | None = None,
        index: Tensor | None = None,
        bias: Tensor | None = None,
        core: Tensor | None = None,
    ):
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.base, self.scale = frozen(weight), scale
        for name, value in (("left", left), ("right", right), ("core", core), ("entries", entries)):
            self.register_parameter(name, None if value is None else frozen(value))
        self.register_buffer("index", index)
        self.register_buffer("keep_base", torch.ones((), device=weight.device))
        assert (left is None) == (right is None) and (entries is None) == (index is None)

    def _pretrained(self) -> Tensor:
        """keep W + S, (m, n)."""
        weight = self.base * self.keep_base.to(self.base.dtype)
        if self.entries is None:
            return weight
        return weight.flatten().index_add(0, self.index, self.entries).view_as(self.base)

    def dense_weight(self) -> Tensor:
        weight = self._pretrained()
        if self.left is None:
            return weight
        left = self.left if self.core is None else self.left @ self.core
        return weight + self.scale * (left @ self.right)

    def factored_forward(self, x: Tensor) -> Tensor:
        if self.is_packed and self.entries is None:
            y = linear(x, self.base) * self.keep_base.to(x.dtype)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        else:
            y = F.linear(x, self.cached(self._pretrained), self.bias)
        if self.left is None:
            return y
        z = F.linear(x, self.right)  # (..., r)
        return y + self.scale * F.linear(z if self.core is None else F.linear(z, self.core), self.left)

    def flops(self, tokens: int, train: bool) -> tuple[float, float, float]:
        m, n = self.out_features, self.in_features
        left, core = self.part("left"), self.part("core")
        r = 0 if left is None else left.shape[1]
        if not train:
            return tokens * (m * n + r * (m + n)), tokens * m * n, m * n * r
        pretrained = (3 if self.entries is not None and self.entries.requires_grad else 2) * m * n
        low = (3 if r and (left if core is None else core).requires_grad else 2) * r
        return tokens * (pretrained + low * (m + n)), tokens * 3 * m * n, low * m * n

    def share_bias_with(self, linear) -> "DeltaLinear":
        self.base = frozen(linear.weight)
        return super().share_bias_with(linear)

    def spec(self) -> dict:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": None if (left := self.part("left")) is None else left.shape[1],
            "scale": self.scale,
            "entries": None if self.entries is None else self.entries.shape[0],
            "bias": self.bias is not None,
            "core": self.core is not None,
        }

    @classmethod
    def empty(cls, in_features, out_features, rank, scale, entries, bias, core) -> "DeltaLinear":
        return cls(
            torch.empty(out_features, in_features),
            None if rank is None else torch.empty(out_features, rank),
            None if rank is None else torch.empty(rank, in_features),
            scale,
            None if entries is None else torch.empty(entries),
            None if entries is None else torch.zeros(entries, dtype=torch.long),
            torch.empty(out_features) if bias else None,
            torch.empty(rank, rank) if core else None,
        )
