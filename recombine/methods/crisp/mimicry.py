"""Neural mimicry (RECAST; CRISP Alg. 2, Eq. 5): a basis and its mixers by gradient descent on the weights themselves.

It minimises sum_i loss(T(B, A_i), W_i), each loss a mean over the entries of a weight, in float32. No data is needed.
The best iterate is kept. It converges to the truncated SVD, which `closed_form.truncate` computes directly. So it
serves the ablations (Fig. 6-8, Tab. 4) and the gates and placements that have no closed form.

Paper: rate 0.01, a step scheduler, up to 1000 steps; B and A_i from N(0, 0.01) in Alg. 2, orthogonal A_i in the text;
the optimiser is not named. Here: Adam, RECAST's scheduler, and 0.01 as the standard deviation of B.
Paper: RECAST's code draws every template (m, n) with Kaiming's deviation, sqrt(2 / n) (attention: sqrt(2 / m)). It
trains by RMSprop at 0.1, a tenth of that every 200 steps, on twice the loss, with noise of 1e-4 on the coefficients and
gradients of norm 1 at most. Here: as above. `basis=template optimizer=rmsprop lr=0.1 factor=2 noise=1e-4 clip=1` is
that loop, group by group, with sqrt(2 / n) everywhere and the noise on the mean of its coefficient sets.
Paper: Fig. 8's uniform start has no range. Here: U(-1, 1) (`init=uniform`), whose deviation is .58. That of the others
is .13 to .25 for mixers (64, 32), so the figure's verdict on the uniform start rests on this choice.

RECAST's rate of 0.1 does not settle: at the exact size three seeds end at a relative error of .0002, .42 and .71. From
the same start, 0.01 ends at .0000. `basis=kaiming` and `basis=xavier` are no templates: they draw B (m n / s, r) by its
own width r.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine.errors import UsageError
from recombine.layers.shared_basis import GATES, PLACEMENTS
from recombine.runtime.kinds import Count, Positive, Rate, Steps, Weight

LOSSES = {"smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss, "mse": F.mse_loss, "l1": F.l1_loss}
INITS = {
    "uniform": lambda a, rng: nn.init.uniform_(a, -1, 1, generator=rng),
    "kaiming": lambda a, rng: nn.init.kaiming_uniform_(a, generator=rng),
    "xavier": lambda a, rng: nn.init.xavier_uniform_(a, generator=rng),
    "orthogonal": lambda a, rng: nn.init.orthogonal_(a, generator=rng),
    "normal": lambda a, rng: nn.init.normal_(a, 0, 0.01, generator=rng),
}
BASES = INITS.keys() | {"template"}
OPTIMIZERS = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}


@dataclass
class Mimicry:
    """Fields of `method.mimicry`: how the descent is run.

    Args:
        loss: between weights: smooth_l1, huber, mse or l1.
        init: start of the mixers: orthogonal, uniform, kaiming, xavier or normal.
        basis: start of the basis: one of the same, or template, N(0, 2 / n) for layers of n inputs.
        optimizer: adam or rmsprop.
        lr: learning rate.
        steps: of the optimizer.
        decay_every: steps after which the rate is divided by 10, again and again.
        factor: of the loss.
        noise: standard deviation of what is added to the mixers in every step's loss.
        clip: largest norm of a group's gradient; None: no limit.
    """

    loss: str = "smooth_l1"
    init: str = "orthogonal"
    basis: str = "normal"
    optimizer: str = "adam"
    lr: Rate = 0.01
    steps: Steps = 1000
    decay_every: Count = 200
    factor: Positive = 1.0
    noise: Weight = 0.0
    clip: Positive | None = None

    def check(self) -> None:
        """Refuses with a UsageError for an unknown name or a number that is not positive."""
        for name, known in (("loss", LOSSES), ("init", INITS), ("basis", BASES), ("optimizer", OPTIMIZERS)):
            if (value := getattr(self, name)) not in known:
                raise UsageError(f"method.mimicry.{name}={value}: must be one of {', '.join(sorted(known))}")
        for name in ("lr", "steps", "decay_every", "factor", "clip"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UsageError(f"method.mimicry.{name}={value}: must be more than 0")
        if self.noise < 0:
            raise UsageError(f"method.mimicry.noise={self.noise}: must not be negative")


def mimic(
    weights: list[Tensor], rank: int, chunk: int, gate: str, placement: str, how: Mimicry, rng: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Fits the basis (m n / s, r) and the mixers [A_1 ... A_g] (r, g s) of a group; also returns the loss reached.

    Args:
        weights: of the group's layers, all (m, n).
        rank: r.
        chunk: s.
        gate: silu, gelu, relu or none.
        placement: of the gate: pre, post or temp.
    """
    pieces = [weight.float().reshape(-1, chunk) for weight in weights]
    goal = torch.cat(pieces, 1)  # (m n / s, g s): equal shapes, so the sum of means is g times the mean
    basis = start_basis(torch.empty(len(goal), rank), weights[0].shape[1], how.basis, rng).to(goal.device)
    mixer = torch.cat([INITS[how.init](torch.empty(rank, chunk), rng) for _ in pieces], 1).to(goal.device)
    loss, compose, gate = LOSSES[how.loss], PLACEMENTS[placement], GATES[gate]
    best, reached = (basis.clone(), mixer.clone()), float("inf")
    with torch.enable_grad():
        optimizer = OPTIMIZERS[how.optimizer]([basis.requires_grad_(), mixer.requires_grad_()], lr=how.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, how.decay_every, 0.1)
        for _ in range(how.steps):
            noisy = mixer + how.noise * torch.randn(mixer.shape, generator=rng).to(mixer) if how.noise else mixer
            value = how.factor * len(pieces) * loss(compose(basis, noisy, gate), goal)
            optimizer.zero_grad()
            value.backward()
            if how.clip is not None:
                nn.utils.clip_grad_norm_([basis, mixer], how.clip)
            if value.item() < reached:
                reached = value.item()
                for copy, factor in zip(best, (basis, mixer), strict=True):
                    copy.copy_(factor.detach())
            optimizer.step()
            scheduler.step()
    return *best, reached


def start_basis(basis: Tensor, width: int, how: str, rng: torch.Generator) -> Tensor:
    """Draws a basis (m n / s, r), in place. width: n, the inputs of the layers."""
    if how == "template":
        return nn.init.normal_(basis, 0, (2 / width) ** 0.5, generator=rng)
    return INITS[how](basis, rng)
