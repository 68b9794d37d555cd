"""RECAST: every weight is a mix of its group's templates (RECAST; CRISP Eq. 3), CRISP with chunk 1 and no gate.

W_i = sum_t a_it T_t: templates T_t (m, n), r to a group, shared and frozen; the r coefficients a_i of a layer train.
Stored per group: r m n + g r. Exact at r = g.

Paper: W_i = (1/K) sum_k sum_t a_ikt T_t with K coefficient sets. Here: the map is linear in a, so one set, their mean,
makes the same weights, K times cheaper. RECAST groups all layers of a role into 6 groups of consecutive ones (2 of 12).
"""

from dataclasses import dataclass
from typing import ClassVar

from recombine.core.method import Site, need
from recombine.methods.crisp.method import Crisp


@dataclass(kw_only=True)
class Recast(Crisp):
    """The fields of Crisp, of which `basis_rank` counts a group's templates; None: group_size, which is exact."""

    chunk: int = 1
    gate: str = "none"
    lr: float = 2e-3

    budget_fields: ClassVar[dict[str, str]] = {
        "retained": "basis_rank",
        "memory": "basis_rank",
        "trainable": "basis_rank",
        "energy": "energy",
    }

    def check(self, sites: list[Site]) -> None:
        need(self.chunk == 1, self, "chunk", "a template is mixed by scalars, so chunk=1; longer ones are method=crisp")
        need(self.gate == "none", self, "gate", "RECAST is linear, so gate=none; a gated mixer is method=crisp")
        super().check(sites)

    def retained_weights(self, sites: list[Site]) -> int:
        """The templates: one in a group of two is retained_50, which the few coefficients must not tip over."""
        stored, coefficients = self.sizes(sites)
        return stored - coefficients
