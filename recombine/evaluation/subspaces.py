"""How alike the principal subspaces of pretrained and adapted weights are (CERSA, arXiv 2605.08174: Tab. 16, Fig. 11).

psi(A, B) = |U_A^i^T U_B^j|_F^2 / min(i, j) (Eq. 3) of the pretrained weight A and the adapted weight B of every target
layer; 1 where one of the two spans holds the other. At a share of the energy, i and j are the ranks that hold it; as a
map, i and j run over all ranks. Output directions U, input directions V.
"""

import copy
from collections import defaultdict

import torch
from torch import Tensor, nn

from recombine.core import checkpoint
from recombine.linalg import energy_rank, svd
from recombine.models.roles import layer_at


@torch.no_grad()
def subspaces(original: nn.Module, model: nn.Module, energy: float, points: int | None = None) -> dict:
    """How alike the principal subspaces of two models' weights are, by role.

    Args:
        energy: the share of the squared singular values at which subspaces are compared, for example 0.95.
        points: ranks a side of the maps; None: no maps.

    Returns:
        {"u": {role: mean over its layers}, "v": ...}, and with `points` the maps {"map_u": {"layer 0": {role: (points,
        points)}, ...}, "map_v": ...} of the first, the middle and the last layer. Empty where nothing was rewritten.

    Row b, column a of a map: the top-j of the adapted against the top-i of the pretrained weight, for ranks i and j
    from 1 to N = min(m, n) in equal steps. Layers that changed their shape, or whose weight is no matrix, are left out.
    """
    if (record := getattr(model, "recombined", None)) is None:
        return {}
    targets = record.targets
    layers = defaultdict(list)
    for name, role in targets.items():
        pretrained = layer_at(original, name).weight
        weight = checkpoint.merged(copy.deepcopy(model.get_submodule(name))).weight
        if record.blocks is None and weight.ndim == 2 and weight.shape == pretrained.shape:
            layers[role].append((pretrained, weight))
    result = {key: defaultdict(dict) for key in ("u", "v", "map_u", "map_v")}
    for role, pairs in layers.items():
        shown = sorted({0, (len(pairs) - 1) // 2, len(pairs) - 1}) if points else ()
        scores = []
        for depth, (weight, adapted) in enumerate(pairs):
            (ua, sa, va), (ub, sb, vb) = svd(weight), svd(adapted)
            i, j = energy_rank(sa, energy), energy_rank(sb, energy)
            both = overlaps(ua, ub), overlaps(va.T, vb.T)
            scores.append([psi[i - 1, j - 1].item() for psi in both])
            if depth in shown:
                at = torch.linspace(1, len(sa), points, dtype=torch.float64).round().long() - 1
                for key, psi in zip(("map_u", "map_v"), both, strict=True):
                    result[key][f"layer {depth}"][role] = psi[at][:, at].T.tolist()
        result["u"][role], result["v"][role] = (sum(values) / len(values) for values in zip(*scores, strict=True))
    return {key: dict(value) for key, value in result.items() if value}


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """psi for every pair of ranks (Eq. 3), as (N, N): at [i - 1, j - 1] that of the first i columns of a and j of b.

    a, b: orthonormal columns (d, N).
    """
    shared = (a.T @ b).square().cumsum(0).cumsum(1)
    i = torch.arange(1, a.shape[1] + 1, dtype=shared.dtype, device=shared.device)
    return (shared / torch.minimum(i[:, None], i[None])).clamp(max=1)
