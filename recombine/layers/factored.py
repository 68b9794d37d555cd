"""W = left . core . right: the map of CERSA, JACTUS, SVFit, SVFT, truncated SVD and their relatives."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine.layers.base import RecombinedLinear, frozen
from recombine.layers.packed import linear


class FactoredLinear(RecombinedLinear):
    """Two factors around a small core: y = left (K (right x)) + bias.

    K = blockdiag(core, diag(tail)) + sigmoid(gate) scatter(entries), (k, k). Several layers may share left or right as
    one Parameter. Stores k (m + n) + |core| + t weights beside the bias, and e + 1 more with entries. All tensors start
    frozen.

    With an order of the inputs, k columns of the right factor are the identity: y = left (K [I right] x[order]) + bias.
    Then it stores k^2 weights less.

    Args:
        left, right: (m, k) and (k, n), or (k, n - k) with an order.
        core: (c, c), or (c,) for a diagonal; None: c = 0.
        tail: (t,), the rest of K's diagonal, with c + t = k; None: t = 0. Without core and tail K is the identity.
        entries, index, gate: entries (e,) at the positions index (2, e) of K, and their scalar gate; None: no entries.
        order: (n,), a permutation of the inputs, kept as int32; None: right is whole.
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
        order: Tensor | None = None,
    ):
        super().__init__(right.shape[1] if order is None else len(order), left.shape[0], bias)
        self.rank = left.shape[1]
        self.left, self.right = frozen(left), frozen(right)
        for name, value in (("core", core), ("tail", tail), ("entries", entries), ("gate", gate)):
            self.register_parameter(name, None if value is None else frozen(value))
        self.register_buffer("index", index)
        self.register_buffer("order", None if order is None else order.int())
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

    def inner(self) -> Tensor:
        """K as a matrix (k, k), or its diagonal (k,) where it has no other entries; not where it is the identity."""
        block, diagonal = self._inner()
        if block is None or diagonal is None:
            return diagonal if block is None else block
        return torch.block_diag(block, torch.diag(diagonal))

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
        return self.part("left"), self.part("right")

    def enter(self, x: Tensor) -> Tensor:
        """x (..., n) to right x, or [I right] x[order] (..., k)."""
        if self.order is None:
            return linear(x, self.right)
        z = linear(x.index_select(-1, self.order[self.rank :]), self.right)
        return z + x.index_select(-1, self.order[: self.rank]).to(z.dtype)

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
        return linear(z, self.left, self.bias)

    def dense_weight(self) -> Tensor:
        left = self._folded()
        if self.order is None:
            return left @ self.right
        return torch.cat([left, left @ self.right], 1).index_select(1, self.order.argsort())

    def pivot(self, right: nn.Parameter, order: Tensor) -> None:
        """Makes k columns of the right factor the identity, in place. The weight stays the same up to rounding.

        What the right factor was there goes into the left one, or into a dense core (k, k).

        Args:
            right, order: what `pivoted` gives for the right factor; layers that share one share these too.
        """
        core = self.core is not None and self.core.shape == (self.rank, self.rank)
        assert self.order is None and self.entries is None and (core or self.is_plain)
        into = self.core if core else self.left
        mixed = into.double() @ self.right.index_select(1, order[: self.rank]).double()
        setattr(self, "core" if core else "left", nn.Parameter(mixed.to(into), requires_grad=into.requires_grad))
        self.right = right
        self.order = order.int()  # a file has no tensor twice

    def flops(self, tokens: int, train: bool) -> tuple[float, float, float]:
        left, right, core = (self.part(name) for name in ("left", "right", "core"))
        m, n, k = self.out_features, right.shape[1], self.rank
        c = k if self.entries is not None else 0 if core is None or len(core.shape) == 1 else core.shape[0]
        if not train:
            return tokens * k * (m + n), tokens * m * self.in_features, m * (c * c + n * k)
        # the backward costs one forward for the input's gradient and one product for each trained factor
        outer = left.requires_grad or right.requires_grad
        inner = any(t is not None and t.requires_grad for t in (core, self.tail, self.entries))
        structured = (3 if outer else 2) * k * (m + n) + (3 if inner else 2) * c * c
        dense = (3 if outer or inner else 2) * m * self.in_features
        build = (3 if outer else 2 if inner else 1) * m * (c * c + n * k)
        return tokens * structured, tokens * dense, build

    def spec(self) -> dict:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "core": None if (core := self.part("core")) is None else list(core.shape),
            "tail": None if self.tail is None else self.tail.shape[0],
            "bias": self.bias is not None,
            "entries": None if self.entries is None else self.entries.shape[0],
        } | ({} if self.order is None else {"pivot": True})

    @classmethod
    def empty(cls, in_features, out_features, rank, core, tail, bias, entries, pivot=False) -> "FactoredLinear":
        sparse = entries is not None
        return cls(
            torch.empty(out_features, rank),
            torch.empty(rank, in_features - (rank if pivot else 0)),
            None if core is None else torch.empty(core),
            None if tail is None else torch.empty(tail),
            torch.empty(out_features) if bias else None,
            torch.empty(entries) if sparse else None,
            torch.zeros(2, entries, dtype=torch.long) if sparse else None,
            torch.empty(()) if sparse else None,
            torch.arange(in_features) if pivot else None,
        )


def pivoted(right: Tensor) -> tuple[Tensor, Tensor]:
    """R (k, n - k) and a permutation (n,) with right = B [I R] on the columns in that order, for right (k, n), k <= n.

    B (k, k) is right at the first k columns of the order. They are the pivots of an LU factorisation of right's row
    space in an orthonormal basis, with partial pivoting. So right may lack rank, and the entries of R stay small: some
    2 at most on what was tried, though no bound below 2^(k - 1) is proved.
    """
    k, n = right.shape
    rows = torch.linalg.qr(right.detach().double().T)[0]  # (n, k)
    factors, swaps = torch.linalg.lu_factor(rows)
    order = list(range(n))
    for i, j in enumerate([] if swaps.is_meta else (swaps - 1).tolist()):
        order[i], order[j] = order[j], order[i]
    upper, lower = factors[:k], factors[k:]  # of the unit lower trapezoid, under the diagonal
    rest = torch.linalg.solve_triangular(upper.tril(-1), lower, upper=False, left=False, unitriangular=True)
    return rest.T, torch.tensor(order, device=right.device)
