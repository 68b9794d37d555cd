"""CRISP: a basis shared by a group of layers and a small gated mixer for each (CRISP Eq. 4, Alg. 1-6).

W_i = reshape(B . G_i, (m, n)), G_i = silu(A_i). g consecutive layers of one role and shape share B
(m n / s, r), frozen in adaptation; A_i (r, s) trains. Stored per group: r m n / s + g r s. Exact at r = g s.

Paper: neural mimicry fits B and A_i by gradient descent; r and s trade places in its Fig. 5. Here: a closed form
(`crisp_closed`), of which mimicry is an approximation, and the names `basis_rank` (r) and `chunk` (s).

Paper: a student starts from "the top-r eigenvectors of the teacher's A and B", which depend on their gauge. Here: from
the same SVD at the student's rank, the truncation of the product B G of an exact teacher.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor, nn

from recombine.calibration import Losses
from recombine.errors import UsageError
from recombine.layers import SharedBasisLinear
from recombine.layers.shared_basis import GATES, PLACEMENTS
from recombine.linalg import energy_rank, shrink
from recombine.methods.base import Method, Site, need
from recombine.methods.crisp_aware import fit_outputs
from recombine.methods.crisp_closed import INVERSES, random_orthogonal, spectrum, stack, truncate, ungate
from recombine.methods.crisp_cluster import Cluster, merge
from recombine.methods.crisp_mimicry import Mimicry, mimic
from recombine.methods.crisp_refine import Refine, refine

log = logging.getLogger(__name__)
FITS = ("closed", "aware", "cluster", "random", "mimicry")


@dataclass(kw_only=True)
class Crisp(Method):
    """Args:
    chunk: length s of the pieces that rows are cut into; divides the width of every target layer.
    group_size: how many consecutive layers of a role share a basis.
    basis_rank: columns r of a basis, at most group_size * chunk; None: that many, which is exact.
    energy: the smallest basis_rank per group that keeps this share of the energy, instead of `basis_rank`.
    gate: silu, gelu, relu or none; relu has no inverse, so only mimicry fits it.
    placement: of the gate: pre (Eq. 4), post or temp (Fig. 6); only mimicry fits the last two.
    gauge: svd scales every row of G alone (B's columns differ in norm), balanced all rows of a group alike.
    fit: closed, the truncated SVD; aware, least squares on the layers' outputs (calibrates); cluster, Alg. 5;
        random, orthogonal factors at the weights' scale (Tab. 8, without SVD); mimicry, gradient descent (Alg. 2).
    alternations: of the aware fit.
    refine: gradient steps after the fit on the weights and the task's loss (Alg. 5, Stage 2; calibrates).
    regulariser: of the mixers in training (Tab. 4): none, l2 |A|^2, orthogonal, or spectral (largest singular value).
    strength: its weight.
    """

    targets: tuple[str, ...] = ("qkv", "o", "up", "down", "gate?")
    chunk: int = 32
    group_size: int = 2
    basis_rank: int | None = None
    energy: float | None = None
    gate: str = "silu"
    placement: str = "pre"
    gauge: str = "svd"
    fit: str = "closed"
    alternations: int = 3
    cluster: Cluster = field(default_factory=Cluster)
    mimicry: Mimicry = field(default_factory=Mimicry)
    refine: Refine = field(default_factory=Refine)
    regulariser: str = "none"
    strength: float = 1e-3

    compresses: ClassVar[bool] = True
    rivals: ClassVar[tuple[str, ...]] = ("basis_rank", "energy")
    knobs: ClassVar[dict[str, str]] = {
        "retained": "basis_rank",
        "memory": "basis_rank",
        "energy": "energy",
        "trainable": "chunk",
    }

    def __post_init__(self):
        super().__post_init__()
        for name, kind in (("cluster", Cluster), ("mimicry", Mimicry), ("refine", Refine)):
            if isinstance(value := getattr(self, name), dict):  # from a YAML or a checkpoint
                setattr(self, name, kind(**value))

    def check(self, sites: list[Site]) -> None:
        need(self.group_size >= 1, self, "group_size", "a group has at least one layer")
        need(self.chunk >= 1, self, "chunk", "a chunk has at least one entry")
        for site in sites:
            width = site.linear.in_features
            divisors = [d for d in range(1, width + 1) if width % d == 0]
            near = min(divisors, key=lambda d: abs(d - self.chunk))
            need(width % self.chunk == 0, self, "chunk", f"does not divide {site.name}'s width {width}; {near} does")
        if self.basis_rank is not None:
            most = self.group_size * self.chunk
            why = f"must be from 1 to group_size * chunk = {most}, where the model is exact"
            need(1 <= self.basis_rank <= most, self, "basis_rank", why)
        if self.energy is not None:
            need(0 < self.energy <= 1, self, "energy", "is a share of the energy, so it must lie in (0, 1]")
        known = {"gate": GATES, "placement": PLACEMENTS, "gauge": ("svd", "balanced"), "fit": FITS}
        for name, values in (known | {"regulariser": ("none", *PENALTIES)}).items():
            need(getattr(self, name) in values, self, name, f"must be one of {', '.join(values)}")
        if self.fit != "mimicry":
            why = f"has no inverse that fit={self.fit} needs; set fit=mimicry, or gate=silu and placement=pre"
            need(self.gate in INVERSES, self, "gate", why)
            need(self.placement == "pre", self, "placement", why)
        need(self.alternations >= 0, self, "alternations", "must not be negative")
        need(self.strength >= 0, self, "strength", "must not be negative")
        for options in (self.cluster, self.mimicry, self.refine):
            options.check()

    @property
    def judges(self) -> bool:
        return self.refine.steps > 0

    def wants(self) -> set[str]:
        return {"inputs"} if self.fit == "aware" else set()

    def choices(self, knob: str, sites: list[Site]) -> Sequence[int]:
        if knob == "basis_rank":
            return range(1, self.group_size * self.chunk + 1)
        width = gcd(*(site.linear.in_features for site in sites))
        return [d for d in range(1, width + 1) if width % d == 0]

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        """Runs of `group_size` consecutive layers of one role and shape; the last run may be shorter."""
        alike = defaultdict(list)
        for site in sites:
            alike[site.role, site.linear.weight.shape].append(site)
        g = self.group_size
        return [layers[i : i + g] for layers in alike.values() for i in range(0, len(layers), g)]

    def group_rank(self, group: list[Site]) -> int:
        most = len(group) * self.chunk
        if self.energy is not None:
            return energy_rank(spectrum(stack(group, self.chunk))[0].sqrt(), self.energy)
        return most if self.basis_rank is None else min(self.basis_rank, most)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        groups = self.groups(sites)
        ranks = [self.group_rank(group) for group in groups]
        mixers = sum(len(group) * r * self.chunk for group, r in zip(groups, ranks, strict=True))
        bases = sum(group[0].linear.weight.numel() // self.chunk * r for group, r in zip(groups, ranks, strict=True))
        return bases + mixers, mixers

    def prepare(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        if self.refine.steps and losses is None:
            why = f"refine.steps={self.refine.steps} calibrates: give apply(..., losses=), a task loss per batch"
            raise UsageError(f"method.{why}")

    def rewrite(self, model: nn.Module, sites: list[Site], losses: Losses | None = None) -> None:
        rng = torch.Generator().manual_seed(torch.initial_seed() % 2**63)  # the run's seed, whatever was drawn since
        original = []
        for group in self.groups(sites):
            basis, mixers = self.factors(group, rng)
            weight = group[0].linear.weight
            basis = nn.Parameter(basis.to(weight), requires_grad=False)  # one parameter: it counts once
            for site, mixer in zip(group, mixers.split(self.chunk, 1), strict=True):
                linear, mixer = site.linear, mixer.to(weight)
                layer = SharedBasisLinear(basis, mixer, linear.in_features, self.gate, linear.bias, self.placement)
                layer.mixer.requires_grad_(True)
                model.set_submodule(site.name, layer)
                if self.refine.steps:
                    original.append((layer, linear.weight.detach()))
        if self.refine.steps:
            refine(original, losses, self.refine)

    def factors(self, group: list[Site], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The basis (m n / s, r) and the mixers [A_1 ... A_g] (r, g s) of a group."""
        rank, m = self.group_rank(group), stack(group, self.chunk)
        if self.fit == "closed":
            return ungate(*truncate(m, rank), self.gate, self.gauge)
        if self.fit == "random":
            return ungate(*random_orthogonal(m, rank, rng), self.gate, self.gauge)
        weights = [site.linear.weight.detach().double() for site in group]
        if self.fit == "mimicry":
            *factors, loss = mimic(weights, rank, self.chunk, self.gate, self.placement, self.mimicry, rng)
            log.info("%s and %d more: mimicry's loss %.3g", group[0].name, len(group) - 1, loss)
            return factors
        if self.fit == "cluster":
            return self.clustered(weights, m, rank, rng)
        inputs = [self.stats[site.name].inputs for site in group]
        moments = [shrink(one.xx, one.x4, one.tokens, floor=0.01) for one in inputs]
        return ungate(*fit_outputs(weights, moments, rank, self.chunk, self.alternations), self.gate, self.gauge)

    def clustered(self, weights: list[Tensor], m: Tensor, rank: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Alg. 5 from an exact teacher; like `factors`."""
        if self.cluster.teacher == "mimicry":
            basis, mixers, _ = mimic(weights, m.shape[1], self.chunk, self.gate, "pre", self.mimicry, rng)
            basis, mixers = basis.double(), mixers.double()
        else:
            basis, mixers = ungate(*truncate(m, m.shape[1]), self.gate, self.gauge)
        if self.cluster.printed:
            return merge(basis, mixers, m, rank, self.cluster)
        return ungate(*merge(basis, GATES[self.gate](mixers), m, rank, self.cluster), self.gate, self.gauge)

    def penalty(self, model: nn.Module) -> Tensor | float:
        if self.regulariser == "none" or self.strength == 0:
            return 0.0
        layers = [x for x in model.modules() if isinstance(x, SharedBasisLinear) and x.mixer.requires_grad]
        return self.strength * sum(PENALTIES[self.regulariser](layer) for layer in layers)


def not_orthogonal(layer: SharedBasisLinear) -> Tensor:
    """|K - I|^2 / d with K = G G^T (r, r), or G^T G (s, s) if that is smaller, scaled to the trace d of I (d, d)."""
    g = layer.gated_mixer()
    gram = g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g
    gram = gram / gram.diagonal().mean()
    return (gram - torch.eye(len(gram)).to(gram)).square().mean(1).sum()


PENALTIES = {
    "l2": lambda layer: layer.mixer.square().sum(),
    "orthogonal": not_orthogonal,
    "spectral": lambda layer: torch.linalg.matrix_norm(layer.mixer, 2),
}
