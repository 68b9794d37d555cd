"""DGMR: diversity-guided MLP reduction by Gram-Schmidt (arXiv 2506.08591).

Of an MLP's rows W (h, d) the longest is picked, and its direction is taken out of all others. Then the row that is
longest now is picked, and so on. After d picks, or as many as W has independent rows, nothing is left; a new round
begins on the rows not yet picked, as they were at first. One round is a QR decomposition of W^T with column pivoting.
The picked neurons stay: rows of up and gate with their biases, columns of down. An MLP with k neurons stores k (2 d)
weights, or k (3 d) with a gate. All of them train in distillation.

Paper: the rounds come from its code, which prunes MLPs without a gate. Here: with a gate a neuron's row is [gate, up],
since a neuron is redundant only if another one has both. As in that code, biases are not ranked.
Paper's code: divides by the rounding error of a row that the picks already span. Here: a row counts as spanned if less
than 1e-5 of its length is new.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recombine.methods.pruning.mlp import Mlp, MlpPruning, rows

NEW = 1e-10  # share of a row's squared length below which it lies in the span of the rows picked before it


@dataclass(kw_only=True)
class Dgmr(MlpPruning):
    """Keeps the neurons whose rows are the most diverse, by Gram-Schmidt (arXiv 2506.08591).

    Args:
        ratio: share of the target layers' weights that is kept; every MLP keeps the same share of its neurons.
    """

    def choose(self, mlps: list[Mlp], counts: list[int]) -> list[Tensor]:
        return [
            gram_schmidt(rows(mlp), k).sort().values if k < mlp.width else torch.arange(k)
            for mlp, k in zip(mlps, counts, strict=True)
        ]


def gram_schmidt(w: Tensor, count: int) -> Tensor:
    """Picks `count` rows of w (h, d), float64; their indices (count,) in the order of the picks."""
    length = w.square().sum(1)  # (h,)
    free = torch.ones_like(length, dtype=torch.bool)
    picked: list[int] = []
    while len(picked) < count:
        new = length.clone()  # squared length of what the round's picks leave of each row
        basis = w.new_empty(min(w.shape[1], count - len(picked)), w.shape[1])  # orthonormal rows
        for j in range(len(basis)):
            new[~free | (new <= NEW * length)] = -1.0
            pick = int(new.argmax())
            if new[pick] < 0:
                break
            q = w[pick]
            for _ in range(2):  # the second pass takes away what rounding left
                q = q - basis[:j].T @ (basis[:j] @ q)
            basis[j] = q / q.norm()
            new -= (w @ basis[j]).square()
            free[pick] = False
            picked.append(pick)
        if not (free & (length > 0)).any():
            break
    zero = free.nonzero().flatten().tolist()  # rows of zeros, the first ones first
    return torch.tensor((picked + zero)[:count])
