"""W = left . core . right: the map of CERSA, JACTUS, SVFit, SVFT, truncated SVD and their relatives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recombine.layers.base import RecombinedLinear, frozen


class FactoredLinear(RecombinedLinear):
    """Two factors around a small core: y = left (K (right x)) + bias.

    K = blockdiag(core, diag(tail)) + sigmoid(gate) scatter(entries), (k, k). Several layers may share left or right as
    one Parameter. Stores k (m + n) + |core| + t weights beside the bias, and e + 1 more with entries. All tensors start
    frozen.

    Args:
        left, right: (m, k) and (k, n).
        core: (c, c), or (c,) for a diagonal; None: c = 0.
        tail: (t,), the rest of K's diagonal, with c + t = k; None: t = 0. Without core and tail K is the identity.
        entries, index, gate: entries (e,) at the positions index (2, e) of K, and their scalar gate; None: no entries.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        core: Tensor | None = None,
        tail: Tensor | None = None,
        bias: Tensor | None = None,
        entries: Tensor | None = None,
        index: Tensor | None = None,
        gate: Tensor | None = None,
    ):
        super().__init__(right.shape[1], left.shape[0], bias)
        self.rank = left.shape[1]
        self.left, self.right = frozen(left), frozen(right)
        for name, value in (("core", core), ("tail", tail), ("entries", entries), ("gate", gate)):
            self.register_parameter(name, None if value is None else frozen(value))
        self.register_buffer("index", index)
        inner = sum(t.shape[0] for t in (core, tail) if t is not None)
        assert inner in (0, self.rank), f"core and tail cover {inner} of {self.rank} directions"
        assert (entries is None) == (index is None) == (gate is None)

    def _inner(self) -> tuple[Tensor | None, Tensor | None]:
        """K as (block (c, c) or None, diagonal of the rest (k - c,) or None); both None: the identity."""
        core, tail = self.core, self.tail
        if core is not None and core.ndim == 1:
            core, tail = None, core if tail is None else torch.cat([core, tail])
        if self.entries is None:
            return core, tail
        diagonal = torch.ones_like(self.left[0]) if tail is None else tail
        block = torch.diag(diagonal) if core is None else torch.block_diag(core, torch.diag(diagonal[len(core) :]))
        values = self.gate.sigmoid() * self.entries
        return block.index_put(tuple(self.index), values.to(block.dtype), accumulate=True), None

    @property
    def is_plain(self) -> bool:
        """Whether K is the identity."""
        return self.core is None and self.tail is None and self.entries is None

    def _folded(self) -> Tensor:
        """left . K, (m, k)."""
        block, diagonal = self._inner()
        c = 0 if block is None else len(block)
        parts = [] if block is None else [self.left[:, :c] @ block]
        if diagonal is not None:
            parts.append(self.left[:, c:] * diagonal)
        return torch.cat(parts, 1) if parts else self.left

    def factored_forward(self, x: Tensor) -> Tensor:
        z = self.enter(x)
        if self.is_frozen:
            return F.linear(z, self.left if self.is_plain else self.cached(self._folded), self.bias)
        return self.leave(self.within(z))

    def common(self) -> tuple[Tensor, ...]:
        return self.left, self.right

    def enter(self, x: Tensor) -> Tensor:
        """x (..., n) to right x (..., k)."""
        return F.linear(x, self.right)

    def within(self, z: Tensor) -> Tensor:
        """z (..., k) to K z (..., k)."""
        block, diagonal = self._inner()
        if block is not None:
            c = len(block)
            head = F.linear(z[..., :c], block)
            z = head if diagonal is None else torch.cat([head, z[..., c:] * diagonal.to(z.dtype)], -1)
        elif diagonal is not None:
            z = z * diagonal.to(z.dtype)
        return z

    def leave(self, z: Tensor) -> Tensor:
        """z (..., k) to left z + bias (..., m)."""
        return F.linear(z, self.left, self.bias)

    def dense_weight(self) -> Tensor:
        return self._folded() @ self.right

    def flops(self, tokens: int, train: bool) -> tuple[float, float, float]:
        m, n, k = self.out_features, self.in_features, self.rank
        c = k if self.entries is not None else 0 if self.core is None or self.core.ndim == 1 else len(self.core)
        if not train:
            return tokens * k * (m + n), tokens * m * n, m * (c * c + n * k)
        # the backward costs one forward for the input's gradient and one product for each trained factor
        outer = self.left.requires_grad or self.right.requires_grad
        inner = any(t is not None and t.requires_grad for t in (self.core, self.tail, self.entries))
        structured = (3 if outer else 2) * k * (m + n) + (3 if inner else 2) * c * c
        dense = (3 if outer or inner else 2) * m * n
        build = (3 if outer else 2 if inner else 1) * m * (c * c + n * k)
        return tokens * structured, tokens * dense, build

    def spec(self) -> dict:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "core": None if self.core is None else list(self.core.shape),
            "tail": None if self.tail is None else self.tail.shape[0],
            "bias": self.bias is not None,
            "entries": None if self.entries is None else self.entries.shape[0],
        }

    @classmethod
    def empty(cls, in_features, out_features, rank, core, tail, bias, entries) -> "FactoredLinear":
        sparse = entries is not None
        return cls(
            torch.empty(out_features, rank),
            torch.empty(rank, in_features),
            None if core is None else torch.empty(core),
            None if tail is None else torch.empty(tail),
            torch.empty(out_features) if bias else None,
            torch.empty(entries) if sparse else None,
            torch.zeros(2, entries, dtype=torch.long) if sparse else None,
            torch.empty(()) if sparse else None,
        )
