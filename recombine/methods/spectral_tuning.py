"""SVFit (arXiv 2409.05926) and SVFT (arXiv 2405.19597): the singular vectors stay, what lies between them trains.

W = U diag(s) V^T with all N = min(m, n) directions: U (m, N), V (N, n) and s (N,) are stored.
SVFit trains the `rank` largest entries of s, N at most.
SVFT trains M and g of U (diag(s) + sigmoid(g) M) V^T: the scalar g and the entries of M (N, N) on a fixed sparsity
pattern, of which a band of d diagonals on each side has N (2 d + 1) - d (d + 1); stored beside them.

Paper (SVFit): the rest of W is kept as a residual matrix. Here: as the other singular values, which is the same W and
what CERSA's Table 14 counts. Paper (SVFT): top-k takes the largest u_i . v_j. Here: the largest in magnitude, as a
singular pair has no sign of its own. The paper's code draws M at random. Here: M = 0, so the model starts as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recombine.errors import UsageError
from recombine.layers import FactoredLinear
from recombine.methods.base import Site, need
from recombine.methods.svd import Spectral


@dataclass(kw_only=True)
class Svfit(Spectral):
    """Args:
    rank: how many of the largest singular values train.
    """

    targets: tuple[str, ...] = ("q", "v")
    rank: int = 768

    compresses: ClassVar[bool] = False
    knobs: ClassVar[dict[str, str]] = {"trainable": "rank", "memory": "rank"}

    def check(self, sites: list[Site]) -> None:
        need(self.rank >= 1, self, "rank", "must be 1 or more; all singular values train where it exceeds their number")

    def choices(self, knob: str, sites: list[Site]) -> Sequence[int]:
        return range(1, 1 + max(directions(site) for site in sites))

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        stored = sum(directions(site) * (1 + sum(site.linear.weight.shape)) for site in sites)
        return stored, sum(min(self.rank, directions(site)) for site in sites)

    def recombine(self, site: Site) -> FactoredLinear:
        (u, s, vh), weight = self.factors(site), site.linear.weight
        core, tail = s[: self.rank].to(weight), s[self.rank :].to(weight)
        layer = FactoredLinear(u.to(weight), vh.to(weight), core, tail if len(tail) else None, site.linear.bias)
        layer.core.requires_grad_(True)
        return layer


@dataclass(kw_only=True)
class Svft(Spectral):
    """Args:
    pattern: where M may differ from 0: plain (the diagonal), banded, or random or top_k with as many entries as banded.
    band: diagonals on each side of the main one; plain does not read it.
    """

    targets: tuple[str, ...] = ("q", "v")
    pattern: str = "banded"
    band: int = 3

    compresses: ClassVar[bool] = False
    knobs: ClassVar[dict[str, str]] = {"trainable": "band", "memory": "band"}

    def check(self, sites: list[Site]) -> None:
        need(self.pattern in PATTERNS, self, "pattern", f"must be one of {', '.join(PATTERNS)}")
        most = min(directions(site) for site in sites) - 1
        need(0 <= self.band <= most, self, "band", f"must be from 0 to {most}: the narrowest target layer has no more")
        if self.pattern == "top_k":
            for site in sites:
                m, n = site.linear.weight.shape
                why = f"compares left with right singular vectors, but {site.name} is {m} x {n}; take banded or random"
                need(m == n, self, "pattern", why)

    def choices(self, knob: str, sites: list[Site]) -> Sequence[int]:
        if self.pattern == "plain":
            raise UsageError("method.pattern='plain' has no band that a budget could set; take banded or budget=none")
        return range(min(directions(site) for site in sites))

    def entries(self, site: Site) -> int:
        """How many entries of M train."""
        k, d = directions(site), 0 if self.pattern == "plain" else self.band
        return k * (2 * d + 1) - d * (d + 1)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        trained = sum(1 + self.entries(site) for site in sites)
        return sum(directions(site) * (1 + sum(site.linear.weight.shape)) for site in sites) + trained, trained

    def recombine(self, site: Site) -> FactoredLinear:
        (u, s, vh), weight = self.factors(site), site.linear.weight
        index = PATTERNS[self.pattern](u, vh).flatten().topk(self.entries(site)).indices.sort().values
        layer = FactoredLinear(
            u.to(weight),
            vh.to(weight),
            tail=s.to(weight),
            bias=site.linear.bias,
            entries=weight.new_zeros(len(index)),
            index=torch.stack([index // len(s), index % len(s)]),
            gate=weight.new_zeros(()),
        )
        layer.entries.requires_grad_(True)
        layer.gate.requires_grad_(True)
        return layer


def diagonals(u: Tensor, vh: Tensor) -> Tensor:
    """(N, N): the nearer to the main diagonal the larger, so that the largest make a band."""
    i = torch.arange(len(vh), device=vh.device)
    return -(i[:, None] - i).abs()


PATTERNS = {  # (U, V^T) -> a score for each entry of M (N, N), of which the largest train
    "plain": diagonals,
    "banded": diagonals,
    "random": lambda u, vh: torch.rand(len(vh), len(vh), device=vh.device),
    "top_k": lambda u, vh: (u.T @ vh.T).abs(),
}


def directions(site: Site) -> int:
    """N, the number of singular values."""
    return min(site.linear.weight.shape)
