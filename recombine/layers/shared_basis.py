"""W_i = reshape(B . gate(A_i)): CRISP and its relatives. B is one Parameter shared by a group of layers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recombine.layers.base import RecombinedLinear, frozen

GATES = {"silu": F.silu, "none": lambda a: a}


class SharedBasisLinear(RecombinedLinear):
    """y = reshape(basis . gate(mixer), (m, n)) x + bias (CRISP Eq. 4).

    basis (m n / s, r), shared; mixer (r, s), the layer's own; the chunk s divides n, so row (i, j) of
    the basis makes the entries W[i, j s : (j + 1) s]. Both start frozen.
    """

    def __init__(self, basis: Tensor, mixer: Tensor, in_features: int, gate: str = "silu", bias: Tensor | None = None):
        super().__init__(in_features, basis.shape[0] * mixer.shape[1] // in_features, bias)
        (self.basis_rank, self.chunk), self.gate = mixer.shape, gate
        assert in_features % self.chunk == 0, f"chunk {self.chunk} does not divide {in_features}"
        self.basis, self.mixer = frozen(basis), frozen(mixer)

    def dense_weight(self) -> Tensor:
        return (self.basis @ GATES[self.gate](self.mixer)).view(self.out_features, self.in_features)

    def structured(self, x: Tensor) -> Tensor:
        gated = GATES[self.gate](self.mixer)  # (r, s)
        mixed = x.reshape(*x.shape[:-1], -1, self.chunk) @ gated.T  # (..., n / s, r)
        return mixed.flatten(-2) @ self.basis.view(self.out_features, -1).T  # (..., m)

    def flops(self, tokens: int, train: bool) -> tuple[float, float, float]:
        m, n, r, s = self.out_features, self.in_features, self.basis_rank, self.chunk
        structured, dense, build = m * n * r / s + n * r, m * n, m * n * r
        if train:
            trains = self.basis.requires_grad + self.mixer.requires_grad
            structured = (3 if self.basis.requires_grad else 2) * m * n * r / s + 3 * n * r
            dense, build = (3 if trains else 2) * dense, (1 + trains) * build
        return tokens * structured, tokens * dense, build

    def spec(self) -> dict:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "basis_rank": self.basis_rank,
            "chunk": self.chunk,
            "gate": self.gate,
            "bias": self.bias is not None,
        }

    @classmethod
    def empty(cls, in_features, out_features, basis_rank, chunk, gate, bias) -> "SharedBasisLinear":
        basis = torch.empty(out_features * in_features // chunk, basis_rank)
        return cls(
            basis, torch.empty(basis_rank, chunk), in_features, gate, torch.empty(out_features) if bias else None
        )
