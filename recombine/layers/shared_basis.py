"""W_i = reshape(B . gate(A_i)): the map of CRISP and its relatives. A group of layers shares B as one Parameter."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recombine.layers.base import RecombinedLinear, frozen
from recombine.layers.packed import linear

GATES = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "none": lambda a: a}
PLACEMENTS = {  # B (u, r), A (r, s), gate -> (u, s)
    "pre": lambda b, a, gate: b @ gate(a),
    "post": lambda b, a, gate: gate(b @ a),
    "temp": lambda b, a, gate: gate(b) @ a,
}


class SharedBasisLinear(RecombinedLinear):
    """A shared basis times a gated mixer: y = reshape(basis . gate(mixer), (m, n)) x + bias (CRISP Eq. 4).

    The chunk s divides n, so row (i, j) of the basis makes the entries W[i, j s : (j + 1) s]. Both tensors start
    frozen.

    Args:
        basis: B (m n / s, r), which a group of layers shares.
        mixer: A (r, s), the layer's own.
        in_features: n.
        gate: silu, gelu, relu or none.
        placement: pre, B gate(A), as in Eq. 4; post, gate(B A); temp, gate(B) A (CRISP Fig. 6).
    """

    def __init__(
        self,
        basis: Tensor,
        mixer: Tensor,
        in_features: int,
        gate: str = "silu",
        bias: Tensor | None = None,
        placement: str = "pre",
    ):
        super().__init__(in_features, basis.shape[0] * mixer.shape[1] // in_features, bias)
        (self.basis_rank, self.chunk), self.gate, self.placement = mixer.shape, gate, placement
        assert in_features % self.chunk == 0, f"chunk {self.chunk} does not divide {in_features}"
        self.basis, self.mixer = frozen(basis), frozen(mixer)

    def dense_weight(self) -> Tensor:
        weight = PLACEMENTS[self.placement](self.basis, self.mixer, GATES[self.gate])
        return weight.view(self.out_features, self.in_features)

    def factored_forward(self, x: Tensor) -> Tensor:
        if self.placement == "post":  # no product to put in order
            return F.linear(x, self.dense_weight(), self.bias)
        return self.leave(self.within(x))

    def common(self) -> tuple[Tensor, ...]:
        return () if self.placement == "post" else (self.part("basis"),)

    def enter(self, x: Tensor) -> Tensor:
        """x (..., n) as it is."""
        return x

    def within(self, x: Tensor) -> Tensor:
        """x (..., n) to its chunks times the mixer, (..., n / s r)."""
        return F.linear(x.reshape(*x.shape[:-1], -1, self.chunk), self.gated_mixer()).flatten(-2)

    def leave(self, mixed: Tensor) -> Tensor:
        """Mixed chunks (..., n / s r) times the basis, and the bias, (..., m)."""
        basis = self.cached(self._gated_basis) if self.placement == "temp" else self.basis
        return linear(mixed, basis, self.bias, rows=self.out_features)

    def gated_mixer(self) -> Tensor:
        """What the basis is multiplied by, (r, s)."""
        return GATES[self.gate](self.mixer) if self.placement == "pre" else self.mixer

    def _gated_basis(self) -> Tensor:
        return GATES[self.gate](self.basis)

    def flops(self, tokens: int, train: bool) -> tuple[float, float, float]:
        m, n, r, s = self.out_features, self.in_features, self.basis_rank, self.chunk
        structured, dense, build = m * n * r / s + n * r, m * n, m * n * r
        if train:
            basis, mixer = self.part("basis").requires_grad, self.part("mixer").requires_grad
            trains = basis + mixer
            structured = (3 if basis else 2) * m * n * r / s + 3 * n * r
            dense, build = (3 if trains else 2) * dense, (1 + trains) * build
        if self.placement == "post":
            return tokens * dense + build, tokens * dense, build
        return tokens * structured, tokens * dense, build

    def spec(self) -> dict:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "basis_rank": self.basis_rank,
            "chunk": self.chunk,
            "gate": self.gate,
            "placement": self.placement,
            "bias": self.bias is not None,
        }

    @classmethod
    def empty(cls, in_features, out_features, basis_rank, chunk, gate, placement, bias) -> "SharedBasisLinear":
        basis = torch.empty(out_features * in_features // chunk, basis_rank)
        bias = torch.empty(out_features) if bias else None
        return cls(basis, torch.empty(basis_rank, chunk), in_features, gate, bias, placement)
