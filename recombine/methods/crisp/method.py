"""CRISP: a basis shared by a group of layers and a small gated mixer for each (CRISP Eq. 4, Alg. 1-6).

W_i = reshape(B . G_i, (m, n)), G_i = silu(A_i). A group of g consecutive layers of one role and shape shares the basis
B (m n / s, r), which is frozen in adaptation. The mixer A_i (r, s) of each layer trains. A group stores
r m n / s + g r s weights. It is exact at r = g s.

Paper: neural mimicry fits B and A_i by gradient descent. Here: a closed form (closed_form.py), which mimicry
approximates.
Paper: r and s trade places in its Fig. 5. Here: r is `basis_rank` and s is `chunk`.
Paper: a student starts from "the top-r eigenvectors of the teacher's A and B", which depend on their scaling. Here:
from the same SVD at the student's rank, the truncation of the product B G of an exact teacher. No field asks for the
paper's start, because it is not defined through a gate.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recombine.core.calibration import Losses
from recombine.core.method import Site, need, need_losses
from recombine.layers import SharedBasisLinear
from recombine.layers.shared_basis import GATES, PLACEMENTS
from recombine.linalg import shrink
from recombine.methods.crisp.activation_aware import fit_outputs
from recombine.methods.crisp.closed_form import INVERSES, random_orthogonal, stack, truncate, ungate
from recombine.methods.crisp.clustering import Cluster, merge
from recombine.methods.crisp.groups import LARGE, SMALL, SharedBases
from recombine.methods.crisp.mimicry import Mimicry, mimic
from recombine.methods.crisp.refinement import Refine, refine
from recombine.methods.crisp.regularizers import PENALTIES
from recombine.runtime import progress
from recombine.runtime.budget_words import STORED
from recombine.runtime.kinds import Rate, Steps, Weight

log = logging.getLogger(__name__)

# The values of the field `fit`. Each function returns a group's basis (m n / s, r) and mixers [A_1 ... A_g] (r, g s).
# m (m n / s, g s) holds the group's weights, stacked.


def closed(group: list[Site], m: Tensor, rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The truncated SVD of the weights."""
    return ungate(*truncate(m, rank), how.gate, how.gauge)


def random(group: list[Site], m: Tensor, rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random orthogonal factors at the weights' scale (Tab. 8)."""
    return ungate(*random_orthogonal(m, rank, rng), how.gate, how.gauge)


def mimicry(group: list[Site], m: Tensor, rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gradient descent on the weights (Alg. 2)."""
    chunk = m.shape[1] // len(group)
    *factors, loss = mimic(weights_of(group), rank, chunk, how.gate, how.placement, how.mimicry, rng)
    log.info("%s and %d more: mimicry's loss %.3g", group[0].name, len(group) - 1, loss)
    return factors


def cluster(group: list[Site], m: Tensor, rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clusters of the columns of an exact teacher (Alg. 5)."""
    if how.cluster.teacher == "mimicry":
        chunk = m.shape[1] // len(group)
        basis, mixers, _ = mimic(weights_of(group), m.shape[1], chunk, how.gate, "pre", how.mimicry, rng)
        basis, mixers = basis.double(), mixers.double()
    else:
        basis, mixers = closed(group, m, m.shape[1], how, rng)
    if how.cluster.printed:
        return merge(basis, mixers, m, rank, how.cluster)
    return ungate(*merge(basis, GATES[how.gate](mixers), m, rank, how.cluster), how.gate, how.gauge)


def aware(group: list[Site], m: Tensor, rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Least squares on the layers' outputs for calibration data."""
    statistics = [how.stats[site.name].inputs for site in group]
    moments = [shrink(inputs.xx, inputs.x4, inputs.tokens, floor=0.01) for inputs in statistics]
    chunk = m.shape[1] // len(group)
    return ungate(*fit_outputs(weights_of(group), moments, rank, chunk, how.alternations), how.gate, how.gauge)


def weights_of(group: list[Site]) -> list[Tensor]:
    """The weights (m, n) of the group's layers, in float64."""
    return [site.module.weight.detach().double() for site in group]


FITS = {"closed": closed, "aware": aware, "cluster": cluster, "random": random, "mimicry": mimicry}
PARTS = {"cluster": Cluster, "mimicry": Mimicry, "refine": Refine}
CHOICES = {
    "gate": GATES,
    "placement": PLACEMENTS,
    "gauge": ("svd", "balanced", "rotated"),
    "fit": FITS,
    "regulariser": ("none", *PENALTIES),
}


@dataclass(kw_only=True)
class Crisp(SharedBases):
    """Shares a basis among a group of layers and trains a gated mixer for each (CRISP Eq. 4, Alg. 1-6).

    `SharedBases` has the fields that decide groups and sizes.

    Args:
        gate: silu, gelu, relu or none. relu has no inverse, so only fit=mimicry takes it.
        placement: of the gate: pre (Eq. 4), post or temp (Fig. 6). Only fit=mimicry takes the last two.
        gauge: how rows of G are scaled before the gate is inverted: svd, each by itself, so that B's columns differ in
            norm; balanced, by the square root of their singular value and one factor; rotated, those at random.
        fit: closed, the truncated SVD; aware, least squares on the layers' outputs (needs calibration data); cluster,
            Alg. 5; random, orthogonal factors at the weights' scale (Tab. 8, without SVD); mimicry, gradient descent
            (Alg. 2). None: aware where a budget limits what is stored and there is calibration data, else closed.
        alternations: of fit=aware: pairs of a step for the mixers and one for the basis.
        cluster: fields of fit=cluster.
        mimicry: fields of fit=mimicry.
        refine: gradient steps after the fit, on the weights and the task's loss (Alg. 5, Stage 2; needs calibration
            data).
        regulariser: of the mixers in training (Tab. 4): none, l2 |A|^2, orthogonal or spectral (top singular value).
        strength: the regulariser's factor in the loss.
        as_paper: the fields that have their default take the paper's form: chunks of 32, groups of 2, mimicry, or the
            truncation under a budget of what is stored, and Alg. 5 and its Stage 2 as printed.
    """

    gate: str = "silu"
    placement: str = "pre"
    gauge: str = "svd"
    fit: str | None = None
    alternations: Steps = 3
    cluster: Cluster = field(default_factory=Cluster)
    mimicry: Mimicry = field(default_factory=Mimicry)
    refine: Refine = field(default_factory=Refine)
    regulariser: str = "none"
    strength: Weight = 1e-3
    as_paper: bool = False
    lr: Rate | None = None

    paper: ClassVar[dict[str, Any]] = {
        **LARGE,
        "fit": "mimicry",
        "cluster": {"printed": True},
        "refine": {"relative": False},
    }

    def __post_init__(self):
        super().__post_init__()
        self._rng = torch.Generator()  # of random fits
        for name, kind in PARTS.items():
            if isinstance(value := getattr(self, name), dict):  # from a YAML or a checkpoint
                setattr(self, name, kind(**value))

    def settled(self, kind: str, calibrates: bool) -> "Crisp":
        method = super().settled(kind, calibrates)
        if method.as_paper and self.fit is None and kind in STORED:
            method = method.copy(fit="closed")  # from which it distils
        known = SMALL if kind in STORED else LARGE
        changes = {name: value for name, value in known.items() if getattr(method, name) is None}
        if not calibrates and changes.get("fit") == "aware":
            changes["fit"] = LARGE["fit"]
        return method.copy(**changes)

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
        for name, known in CHOICES.items():
            ok = getattr(self, name) in (*known, getattr(Crisp, name))
            need(ok, self, name, f"must be one of {', '.join(known)}")
        if (fit := self.fit or LARGE["fit"]) != "mimicry":
            why = f"has no inverse that fit={fit} needs; set fit=mimicry, or gate=silu and placement=pre"
            need(self.gate in INVERSES, self, "gate", why)
            need(self.placement == "pre", self, "placement", why)
        for name in ("alternations", "strength"):
            need(getattr(self, name) >= 0, self, name, "must not be negative")
        for name in PARTS:
            getattr(self, name).check()

    @property
    def needs_trained_head(self) -> bool:
        return self.refine.steps > 0

    def statistics_needed(self) -> set[str]:
        return {"inputs"} if self.fit == "aware" else set()

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """basis (m n / s, r) and mixers (r, g s) of a group, as they are stored."""
        chunk, weight = self.group_chunk(group), group[0].module.weight
        basis, mixers = FITS[self.fit or LARGE["fit"]](
            group, stack(group, chunk), self.group_rank(group), self, self._rng
        )
        return {"basis": basis.to(weight), "mixers": mixers.to(weight)}

    def before_budget(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        if self.refine.steps:
            need_losses(self, losses)

    def rewrite(self, model: nn.Module, sites: list[Site], losses: Losses | None = None) -> None:
        self._rng.manual_seed(torch.initial_seed() % 2**63)  # the run's seed, whatever was drawn since
        original = []
        for group in progress.of(self.groups(sites), "factors", "groups"):
            found = self.digested(group)
            basis = nn.Parameter(found["basis"], requires_grad=False)  # one parameter: it counts once
            for site, mixer in zip(group, found["mixers"].split(self.group_chunk(group), 1), strict=True):
                linear, mixer = site.module, mixer.clone()
                layer = SharedBasisLinear(basis, mixer, linear.in_features, self.gate, linear.bias, self.placement)
                layer.mixer.requires_grad_(True)
                self.kept.put(model, site.name, layer)
                if self.refine.steps:
                    original.append((layer, linear.weight.detach()))
            self.kept.drop(group[0].name)
        if self.refine.steps:
            refine(original, losses, self.refine)

    def penalty(self, model: nn.Module) -> Tensor | float:
        if self.regulariser == "none" or self.strength == 0:
            return 0.0
        layers = [x for x in model.modules() if isinstance(x, SharedBasisLinear) and x.mixer.requires_grad]
        return self.strength * sum(PENALTIES[self.regulariser](layer) for layer in layers)
