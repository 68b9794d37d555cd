"""What is measured of a model after its stage, beside its score: the keys of `analyse`, from CERSA (arXiv 2605.08174).

subspaces (Tab. 16, Fig. 11 and 12): psi(A, B) = |U_A^i^T U_B^j|_F^2 / min(i, j) (Eq. 3) of the pretrained weight A and
the adapted weight B of every target layer; 1 where one of the two spans holds the other. At a share of the energy, i
and j are the ranks that hold it; as a map, i and j run over all ranks. Output directions U, input directions V.

elsewhere (Tab. 15, Fig. 10): how well the backbone's features still serve other tasks. The forgetting rate is
(before - after) / before of the means over them. Paper: how a model tuned for one task classifies another is not said.
Here: a linear probe on the features in front of the head, fitted on that task's training set, before and after.
"""

import copy
from collections import defaultdict

import torch
from torch import Tensor, nn

from recombine.core import checkpoint
from recombine.core.budget import stored_in_targets
from recombine.evaluation import linear_probe
from recombine.linalg import energy_rank, svd
from recombine.models import roles
from recombine.result_schema import AnalysisPart
from recombine.stages.context import Run


def before(run: Run) -> nn.Module | None:
    """The pretrained model, where an analysis will compare with it."""
    asked = run.cfg.analyse
    return copy.deepcopy(run.model) if asked.subspaces or asked.maps or run.others else None


def after(run: Run, original: nn.Module | None) -> AnalysisPart:
    """What the analyses add to the result. original: as `before` returned it; its fused qkv may come back split."""
    found = costs(run)
    if original is None:
        return found
    asked, device = run.cfg.analyse, next(original.parameters()).device
    run.model.to(device)  # Lightning leaves it on the CPU
    if asked.subspaces or asked.maps:
        found["subspaces"] = subspaces(original, run.model, asked.subspaces or 1.0, asked.maps)
    if run.others:
        tasks = run.others
        was, now = ({t: linear_probe.fit(m, data).test for t, data in tasks.items()} for m in (original, run.model))
        found["elsewhere"] = {"before": was, "after": now, "forgetting": forgetting(was, now)}
    return found


def costs(run: Run) -> AnalysisPart:
    """memory_rate: weights + gradients + AdamW's moments over the pretrained weights, of the target layers alone
    (CERSA's (mr + nr + 4 r^2) / (mn)) and of the whole model. images_per_second: of the training, validation included.
    """
    found, record = {}, getattr(run.model, "recombined", None)
    if record is not None:
        trained = {id(p): p.numel() for p in run.model.parameters() if p.requires_grad}
        layers = [run.model.get_submodule(name) for name in record.targets]
        inside = {id(p) for layer in layers for n, p in layer.named_parameters() if not n.endswith("bias")}
        stored = sum(p.numel() for p in run.model.parameters())
        targets = stored_in_targets(run.model) + 3 * sum(trained.get(p, 0) for p in inside)
        found["memory_rate"] = {
            "targets": targets / record.dense,
            "model": (stored + 3 * sum(trained.values())) / record.total,
        }
    if (seconds := run.seconds.get("train_best")) and (epochs := len(run.curves["best"].get("train/loss", ()))):
        found["images_per_second"] = epochs * len(run.data.train) / seconds
    return found


def forgetting(was: dict[str, float], now: dict[str, float]) -> float:
    """The drop of the mean accuracy as a share of the mean accuracy before; negative where it rose."""
    return 1 - sum(now.values()) / sum(was.values())


@torch.no_grad()
def subspaces(original: nn.Module, model: nn.Module, energy: float, points: int | None = None) -> dict:
    """{"u": {role: mean over its layers}, "v": ...} at that share of the energy, and with `points` the maps
    {"map_u": {"layer 0": {role: (points, points)}, ...}, "map_v": ...} of the first, the middle and the last layer.

    Row b, column a of a map: the top-j of the adapted against the top-i of the pretrained weight, for ranks i and j
    from 1 to N = min(m, n) in equal steps. Layers that changed their shape are left out.
    """
    if (record := getattr(model, "recombined", None)) is None:
        return {}
    targets = record.targets
    roles.find(original, tuple(targets.values()), nn.Module)  # splits a fused qkv as the model's
    layers = defaultdict(list)
    for name, role in targets.items():
        weight = checkpoint.merged(copy.deepcopy(model.get_submodule(name))).weight
        if record.blocks is None and weight.shape == original.get_submodule(name).weight.shape:
            layers[role].append((original.get_submodule(name).weight, weight))
    found = {key: defaultdict(dict) for key in ("u", "v", "map_u", "map_v")}
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
                    found[key][f"layer {depth}"][role] = psi[at][:, at].T.tolist()
        found["u"][role], found["v"][role] = (sum(values) / len(values) for values in zip(*scores, strict=True))
    return {key: dict(value) for key, value in found.items() if value}


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """psi of the first i columns of a (d, N) and the first j of b (d, N), both orthonormal: (N, N) at [i - 1, j - 1]"""
    shared = (a.T @ b).square().cumsum(0).cumsum(1)
    i = torch.arange(1, a.shape[1] + 1, dtype=shared.dtype, device=shared.device)
    return (shared / torch.minimum(i[:, None], i[None])).clamp(max=1)
