"""W = left . core . right: CERSA, truncated SVD and their relatives."""

import torch
from torch import Tensor

from recombine.layers.base import RecombinedLinear, frozen


class FactoredLinear(RecombinedLinear):
    """y = left (blockdiag(core, diag(tail)) (right x)) + bias.

    left (m, k), right (k, n); core (c, c) or None; tail (t,) or None; c + t = k, or both None for the
    identity. Stores k(m + n) + c^2 + t weights beside the bias. All tensors start frozen.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        core: Tensor | None = None,
        tail: Tensor | None = None,
        bias: Tensor | None = None,
    ):
        super().__init__(right.shape[1], left.shape[0], bias)
        self.rank = left.shape[1]
        self.left, self.right = frozen(left), frozen(right)
        self.register_parameter("core", None if core is None else frozen(core))
        self.register_parameter("tail", None if tail is None else frozen(tail))
        inner = sum(t.shape[0] for t in (core, tail) if t is not None)
        assert inner in (0, self.rank), f"core and tail cover {inner} of {self.rank} directions"

    def _folded(self) -> Tensor:
        """left . blockdiag(core, diag(tail)), (m, k)."""
        c = 0 if self.core is None else self.core.shape[0]
        parts = [] if self.core is None else [self.left[:, :c] @ self.core]
        if self.tail is not None:
            parts.append(self.left[:, c:] * self.tail)
        return torch.cat(parts, 1) if parts else self.left

    def structured(self, x: Tensor) -> Tensor:
        z = x @ self.right.T  # (..., k)
        if self.frozen_now:
            return z @ self.keep(self._folded).T
        if self.core is not None:
            c = self.core.shape[0]
            head = z[..., :c] @ self.core.T
            z = head if self.tail is None else torch.cat([head, z[..., c:] * self.tail], -1)
        elif self.tail is not None:
            z = z * self.tail
        return z @ self.left.T

    def dense_weight(self) -> Tensor:
        return self._folded() @ self.right

    def flops(self, tokens: int, train: bool) -> tuple[float, float, float]:
        m, n, k = self.out_features, self.in_features, self.rank
        c = 0 if self.core is None else self.core.shape[0]
        if not train:
            return tokens * k * (m + n), tokens * m * n, m * (c * c + n * k)
        # the backward costs one forward for the input's gradient and one product for each trained factor
        outer = self.left.requires_grad or self.right.requires_grad
        inner = any(t is not None and t.requires_grad for t in (self.core, self.tail))
        structured = (3 if outer else 2) * k * (m + n) + (3 if inner else 2) * c * c
        dense = (3 if outer or inner else 2) * m * n
        build = (3 if outer else 2 if inner else 1) * m * (c * c + n * k)
        return tokens * structured, tokens * dense, build

    def spec(self) -> dict:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "core": None if self.core is None else self.core.shape[0],
            "tail": None if self.tail is None else self.tail.shape[0],
            "bias": self.bias is not None,
        }

    @classmethod
    def empty(cls, in_features, out_features, rank, core, tail, bias) -> "FactoredLinear":
        return cls(
            torch.empty(out_features, rank),
            torch.empty(rank, in_features),
            None if core is None else torch.empty(core, core),
            None if tail is None else torch.empty(tail),
            torch.empty(out_features) if bias else None,
        )
