"""RECAST: every weight is a mix of its group's templates (RECAST; CRISP Eq. 3), CRISP with chunk 1 and no gate.

W_i = sum_t a_it T_t. The r templates T_t (m, n) of a group are shared and frozen. The r coefficients a_i of each layer
train. A group of g layers stores r m n + g r weights. It is exact at r = g.

Paper: W_i = (1/K) sum_k sum_t a_ikt T_t with K coefficient sets. Here: one set. The map is linear in a, so the mean of
K sets makes the same weights, K times cheaper. As in the paper, a group is two consecutive layers of a role (12 layers
make 6 groups).
Paper: templates and coefficients come from gradient descent. Here: from the closed form. The switches of its code's
descent, and what differs then, stand in mimicry.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from recombine.core.method import Site, need
from recombine.methods.crisp.method import Crisp
from recombine.runtime.kinds import Rate


@dataclass(kw_only=True)
class Recast(Crisp):
    """Mixes the templates of a group by scalars that train (RECAST; CRISP Eq. 3).

    The fields are Crisp's.

    Args:
        basis_rank: the number r of a group's templates; None: group_size, which is exact.
    """

    chunk: int = 1
    group_size: int = 2
    fit: str = "closed"
    gate: str = "none"
    lr: Rate = 2e-3

    paper: ClassVar[dict[str, Any]] = {}
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
        """The templates' weights: one template for two layers is retained_50, whatever the few coefficients add."""
        stored, coefficients = self.sizes(sites)
        return stored - coefficients
