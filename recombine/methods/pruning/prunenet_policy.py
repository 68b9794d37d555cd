"""PruneNet's policy, and the two estimators by which it learns which rows to keep (see prunenet.py)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISCOUNT = 0.99
ZERO = 1e-7  # share of the largest singular value below which one is 0


class Policy(nn.Module):
    """Scores rows: state W (h, d) -> z (h,). A row's weight in the draw is sigmoid(z)."""

    def __init__(self, h: int, d: int):
        super().__init__()
        self.project, self.importance = nn.Linear(d, h), nn.Parameter(torch.rand(h))

    def forward(self, w: Tensor) -> Tensor:
        # (W P^T + b) s = W (P^T s) + b s
        return w @ (self.project.weight.T @ self.importance) + self.project.bias @ self.importance


@torch.enable_grad()
def search(states: list[Tensor], k: int, episodes: int, lr: float, seed: int, estimator: str = "exact") -> list[Tensor]:
    """Learns a policy for states of one shape; returns the indices (k,), ascending, of the rows that stay of each.

    Args:
        states: each (h, d).
        k: how many rows stay.
        episodes: how often rows are drawn from every state.
        lr: learning rate.
        seed: of the policy's weights and its draws.
        estimator: exact or paper.
    """
    if k == len(states[0]):
        return [torch.arange(k)] * len(states)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(*states[0].shape)
    rng, whole = torch.Generator().manual_seed(seed), [spectrum(w) for w in states]
    optimizer = torch.optim.AdamW(policy.parameters(), lr)

    def distance(i: int, kept: Tensor) -> float:
        return ks_distance(whole[i], spectrum(states[i][kept.to(states[i].device)]))

    inputs = [w.float().cpu() for w in states]
    return {"exact": exact, "paper": paper}[estimator](policy, optimizer, inputs, k, episodes, distance, rng)


def exact(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    states: list[Tensor],
    k: int,
    episodes: int,
    distance: Callable[[int, Tensor], float],
    rng: torch.Generator,
) -> list[Tensor]:
    """REINFORCE with the exact probability of a draw and a baseline; returns the best slices met.

    Args:
        states: each (h, d), float32.
        distance: (place of a state, row indices (k,)) -> KS.
        rng: of the draws.
    """
    best: list[tuple[float, Tensor]] = [(0.0, torch.empty(0))] * len(states)
    total = [0.0] * len(states)

    def reward(i: int, kept: Tensor) -> float:
        value = 1 / max(distance(i, kept), 1 / min(states[i].shape))
        if value > best[i][0]:
            best[i] = (value, kept.sort().values)
        return value

    for episode in range(episodes):
        for i, w in enumerate(states):
            scores = F.logsigmoid(policy(w))  # (h,)
            noise = -torch.log(-torch.log(torch.rand(len(scores), generator=rng).clamp(1e-20, 1 - 1e-7)))
            order = (scores.detach() + noise).argsort(descending=True)  # its first k: a draw without replacement
            drawn = scores[order]
            rest = drawn.flip(0).logcumsumexp(0).flip(0)  # log of the weight of all that was left at each draw
            gain = reward(i, order[:k])
            advantage = gain - total[i] / episode if episode else 0.0
            total[i] += gain
            optimizer.zero_grad()
            (-(DISCOUNT**i) * advantage * (drawn - rest)[:k].sum()).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
    with torch.no_grad():
        for i, w in enumerate(states):
            reward(i, policy(w).topk(k).indices)
    return [kept for _, kept in best]


def paper(policy, optimizer, states, k, episodes, distance, rng) -> list[Tensor]:
    """The estimator of the authors' code; the last policy draws once more. Arguments as those of `exact`.

    Weights are noisy, the log-probability is the sum of their logarithms, and the reward has no baseline.
    """

    def weights(w: Tensor) -> Tensor:
        """log o (h,), o = sigmoid(logit(a) + logit(eps)): relaxed Bernoulli."""
        eps = torch.rand(len(w), generator=rng).clamp(1e-7, 1 - 1e-7)
        return F.logsigmoid(policy(w) + eps.logit())

    def draw(w: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.multinomial(weights(w).exp(), k, generator=rng).sort().values

    for _ in range(episodes):
        kept = [draw(w) for w in states]
        gaps = [distance(i, rows) for i, rows in enumerate(kept)]
        for i, (w, rows, gap) in enumerate(zip(states, kept, gaps, strict=True)):
            optimizer.zero_grad()
            (-(DISCOUNT**i) * (1 / gap if gap else 99999.0) * weights(w)[rows].sum()).backward()
            optimizer.step()
    return [draw(w) for w in states]


def spectrum(w: Tensor) -> Tensor:
    """Singular values (min(h, d),), ascending, by the smaller Gram matrix.

    Those below ZERO times the largest are set to 0.
    """
    w = w.double()
    values = torch.linalg.eigvalsh(w.T @ w if len(w) >= w.shape[1] else w @ w.T).clamp(min=0).sqrt()
    return values.where(values > ZERO * values[-1], 0.0)


def ks_distance(a: Tensor, b: Tensor) -> float:
    """The Kolmogorov-Smirnov distance of two ascending samples: the largest gap of their empirical distributions."""
    both = torch.cat([a, b])
    below = [torch.searchsorted(sample, both, right=True).double() / len(sample) for sample in (a, b)]
    return float((below[0] - below[1]).abs().max())
