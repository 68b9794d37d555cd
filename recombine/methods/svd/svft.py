"""SVFT: the singular vectors stay, a sparse matrix between them trains (arXiv 2405.19597).

The weight is U (diag(s) + sigmoid(g) M) V^T, with W = U diag(s) V^T in all N = min(m, n) directions. A layer stores
U (m, N), V (N, n), s (N,), the scalar g and the entries of M (N, N) on a fixed sparsity pattern. g and the entries of M
alone train; a band of d diagonals on each side has N (2 d + 1) - d (d + 1) entries.

Paper: top-k takes the largest u_i . v_j (`pattern=top_k_signed`). Here: the largest in magnitude, since a singular pair
has no sign of its own.
Paper's code: top-k takes the largest entries of U V instead of U^T V, and random places are drawn with replacement.
Here: u_i . v_j as in the text, and places without replacement, so that there are as many.
Paper: its code draws M from a Kaiming normal over its e entries, of variance 2 / e (`start=kaiming`). Here: M = 0, so
the model starts as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recombine.core.method import Site, need
from recombine.errors import UsageError
from recombine.layers import FactoredLinear
from recombine.methods.svd.spectral import Spectral, directions


@dataclass(kw_only=True)
class Svft(Spectral):
    """Trains a sparse matrix between the singular vectors of every weight (arXiv 2405.19597).

    Args:
        pattern: where M may differ from 0: plain (the diagonal), banded, or random, top_k or top_k_signed with as many
            entries as banded.
        band: diagonals on each side of the main one; plain does not read it.
        start: of M: zero leaves the model as it was; kaiming draws M as the paper's code does.
        as_paper: fields that have their default take those of the paper, which `paper` names.
    """

    targets: tuple[str, ...] = ("q", "v")
    pattern: str = "banded"
    band: int = 3
    start: str = "zero"
    as_paper: bool = False

    paper: ClassVar[dict[str, Any]] = {"pattern": "top_k_signed", "start": "kaiming"}
    compresses: ClassVar[bool] = False
    budget_fields: ClassVar[dict[str, str]] = {"trainable": "band", "memory": "band"}

    def check(self, sites: list[Site]) -> None:
        need(self.pattern in PATTERNS, self, "pattern", f"must be one of {', '.join(PATTERNS)}")
        most = min(directions(site) for site in sites) - 1
        need(0 <= self.band <= most, self, "band", f"must be from 0 to {most}: the narrowest target layer has no more")
        need(self.start in ("zero", "kaiming"), self, "start", "must be zero or kaiming")
        if self.pattern.startswith("top_k"):
            for site in sites:
                m, n = site.module.weight.shape
                why = f"compares left with right singular vectors, but {site.name} is {m} x {n}; take banded or random"
                need(m == n, self, "pattern", why)

    def budget_values(self, field: str, sites: list[Site]) -> Sequence[int]:
        if self.pattern == "plain":
            raise UsageError("method.pattern='plain' has no band that a budget could set; take banded or budget=none")
        return range(min(directions(site) for site in sites))

    def entries(self, site: Site) -> int:
        """The number of entries of M that train."""
        k, d = directions(site), 0 if self.pattern == "plain" else self.band
        return k * (2 * d + 1) - d * (d + 1)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        trained = sum(1 + self.entries(site) for site in sites)
        return sum(directions(site) * (1 + sum(site.module.weight.shape)) for site in sites) + trained, trained

    def recombine(self, site: Site) -> FactoredLinear:
        (u, s, vh), weight = self.factors(site), site.module.weight
        index = PATTERNS[self.pattern](u, vh).flatten().topk(self.entries(site)).indices.sort().values
        entries = weight.new_zeros(len(index))
        if self.start == "kaiming":
            nn.init.kaiming_normal_(entries[None])
        layer = FactoredLinear(
            u.to(weight),
            vh.to(weight),
            tail=s.to(weight),
            bias=site.module.bias,
            entries=entries,
            index=torch.stack([index // len(s), index % len(s)]),
            gate=weight.new_zeros(()),
        )
        layer.entries.requires_grad_(True)
        layer.gate.requires_grad_(True)
        return layer


def diagonals(u: Tensor, vh: Tensor) -> Tensor:
    """Scores (N, N) that are larger nearer to the main diagonal, so that the largest make a band."""
    i = torch.arange(len(vh), device=vh.device)
    return -(i[:, None] - i).abs()


PATTERNS = {  # (U, V^T) -> a score for each entry of M (N, N), of which the largest train
    "plain": diagonals,
    "banded": diagonals,
    "random": lambda u, vh: torch.rand(len(vh), len(vh), device=vh.device),
    "top_k": lambda u, vh: (u.T @ vh.T).abs(),
    "top_k_signed": lambda u, vh: u.T @ vh.T,
}
