"""Starts of LoRA from calibration data: EVA (arXiv 2410.07170) and CorDA (arXiv 2406.05223), by peft's own words.

C = E[x x^T] (n, n) are the second moments of a layer's inputs, and W + s B A is what the layer applies.

EVA: the rows of A are the eigenvectors of C with the largest eigenvalues; B = 0. The ranks of all layers together stay
what they are, but go to the directions that explain most of their layer's inputs, up to rho times the rank a layer.
Paper: an incremental PCA of the centred inputs, until its directions stand still. Here: C of all calibration batches.
Paper: a layer may be left without a direction. Here: every layer keeps one.

CorDA: with U S V^T the SVD of W C, s B A = U_r U_r^T W and the rest of W stays frozen; nothing is inverted. ipm takes
the r largest singular values (instruction-previewed), kpm the r smallest (knowledge-preserved).
Paper: inputs are divided by the largest of their sample, and C is damped until its inverse is exact. Here: C is divided
by the mean of its diagonal, then 0.01 is added to the diagonal.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recombine.core.method import Site
from recombine.errors import UsageError

DAMPING = 0.01  # of CorDA, as a share of the mean second moment
STARTS: dict[str, dict[str, Any]] = {  # init_lora_weights -> what its own option, eva_config, may say, and how it is
    "eva": {"rho": 2.0},
    "corda": {"corda_method": "ipm"},
}


def start_of(options: Mapping[str, Any]) -> str | None:
    """Eva, corda, or None for the starts that peft makes without data."""
    init = options.get("init_lora_weights")
    return init if isinstance(init, str) and init in STARTS else None


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the start: {"rho": 2.0}, or {"corda_method": "ipm"}."""
    start = start_of(options)
    return STARTS[start] | dict(options.get(f"{start}_config") or {})


def check_start(options: Mapping[str, Any]) -> None:
    """Checks the options of a start from data.

    Raises:
        UsageError: a setting is unknown or out of range, belongs to another start, or sets ranks that EVA sets.
    """
    start = start_of(options)
    for other in STARTS:
        if other != start and options.get(key := f"{other}_config"):
            raise UsageError(f"method.options.{key}: is for init_lora_weights={other}; set that, or drop it")
    if start is None:
        return
    if not isinstance(given := options.get(key := f"{start}_config") or {}, Mapping):
        raise UsageError(f"method.options.{key}={given!r}: must be a group such as {STARTS[start]}")
    if unknown := given.keys() - STARTS[start].keys():
        why = f"the start is computed from calibration data here; it takes {', '.join(STARTS[start])}"
        raise UsageError(f"method.options.{key}.{min(map(str, unknown))}: {why}")
    settings = settings_of(options)
    if start == "corda" and settings["corda_method"] not in ("ipm", "kpm"):
        raise UsageError(f"method.options.{key}.corda_method={settings['corda_method']!r}: must be ipm or kpm")
    rho = settings.get("rho", 1)
    if start == "eva" and (isinstance(rho, bool) or not isinstance(rho, int | float) or not 1 <= rho <= 1000):
        raise UsageError(f"method.options.{key}.rho={rho!r}: must be from 1 (no layer gets more) to 1000")
    if start == "eva" and options.get("rank_pattern"):
        raise UsageError("method.options.rank_pattern: EVA sets the ranks of layers itself; drop one of the two")
    if options.get("layers_to_transform") is not None:
        raise UsageError(f"method.options.layers_to_transform: {start} starts every target layer; say them by targets")


def digest(start: str, site: Site, moment: Tensor) -> dict[str, Tensor]:
    """What a start needs of a layer, in float64, without its statistics.

    Args:
        moment: C (n, n).

    Returns:
        EVA: shares (N,) of tr C, N = min(m, n), largest first, and their directions (N, n). CorDA: u (m, N) and s (N,).
    """
    if start == "eva":
        values, vectors = torch.linalg.eigh(moment)
        most = min(site.module.in_features, site.module.out_features)
        values = values.flip(0).clamp(min=0)
        return {"shares": values[:most] / values.sum().clamp(min=1e-300), "directions": vectors.flip(1).T[:most]}
    metric = moment / moment.diagonal().mean().clamp(min=1e-300)
    metric = metric + DAMPING * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    u, s, _ = torch.linalg.svd(site.module.weight.detach().double() @ metric, full_matrices=False)
    return {"u": u, "s": s}


def redistributed(rank: int, rho: float, widths: Mapping[str, int], shares: Mapping[str, Tensor]) -> dict[str, int]:
    """EVA's rank of every layer, at least 1. Together they are as many as before.

    Args:
        widths: the largest rank that each layer can have.
        shares: of each layer's second moments that its directions explain, largest first.
    """
    ranks = dict.fromkeys(widths, 1)
    left = sum(min(rank, width) for width in widths.values()) - len(ranks)
    pool = [
        (share, name)
        for name, width in widths.items()
        for share in shares[name][1 : min(round(rho * rank), width)].tolist()
    ]
    for _, name in sorted(pool, key=lambda entry: -entry[0])[:left]:  # a stable sort: ties go to earlier layers
        ranks[name] += 1
    return ranks


@torch.no_grad()
def set_start(start: str, layer: nn.Module, found: Mapping[str, Tensor], part: str) -> None:
    """Gives peft's LoRA layer its start, in place.

    Args:
        found: what `digest` gave.
        part: ipm or kpm, of CorDA.
    """
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rank, scale = len(a), layer.scaling["default"]
    if start == "eva":
        a.copy_(found["directions"][:rank])
        return
    base = layer.get_base_layer().weight
    chosen = slice(None, rank) if part == "ipm" else slice(-rank, None)
    u, s = found["u"][:, chosen], found["s"][chosen].clamp(min=1e-12 * found["s"][0].clamp(min=1e-300))
    right = u.T @ base.double()
    b.copy_(u * (s / scale).sqrt())
    a.copy_(right / (s * scale).sqrt()[:, None])
    base.copy_(base.double() - scale * b.double() @ a.double())
