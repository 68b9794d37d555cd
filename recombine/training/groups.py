"""The optimizer's groups of parameters: each kind has its own rate and weight decay."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from recombine.core.method import Method
from recombine.errors import UsageError
from recombine.layers import DeltaLinear
from recombine.models import roles
from recombine.training.optimizers import takes_muon
from recombine.training.rates import RELATIVE, movements
from recombine.training.settings import OptimizerSettings

PLAIN = 1e-3  # rate of what is no factor, where neither optimizer nor method has one


class Kind(NamedTuple):
    """What a group's parameters have in common.

    head: of the classification head. matrix: of two dimensions or more. muon: Muon moves them. second: the B of pairs
    B A. movement: how far 1 moves their layer's weight, where rates are relative; None: they are no factors.
    """

    head: bool
    matrix: bool
    muon: bool
    second: bool
    movement: float | None


@dataclass(frozen=True)
class Rates:
    """The peak rates of a training.

    lr: of all but the head; where rates are relative, of the factors. plain: of the others then.
    movements: by name, where rates are relative; None: they are not.
    """

    optim: OptimizerSettings
    lr: float
    plain: float
    movements: Mapping[str, float] | None = None

    def of(self, kind: Kind) -> float:
        """The peak rate of a group."""
        if kind.head:
            return self.optim.lr_head
        if self.movements is not None:
            return self.plain if kind.movement is None else self.lr / kind.movement
        return self.lr * (self.optim.lr_ratio if kind.second else 1)


def peak_rate(method: Method, optim: OptimizerSettings, key: str, slot: str) -> tuple[float, bool, str]:
    """The rate of what the method trains, whether it is relative, and the key of the configuration that sets it.

    Args:
        key: of `optim` in the configuration, and slot: of the method.

    Raises:
        UsageError: the method's own rate is relative, and the optimizer can have none.
    """
    lr, named = (method.lr, f"{slot}.lr") if optim.lr is None else (optim.lr, f"{key}.lr")
    if lr is None and optim.name == "sgd":
        why = f"{slot}.lr=null is a relative rate, and a step of sgd is as large as the gradient"
        raise UsageError(f"{key}.name=sgd: {why}; give {key}.lr, or say {key}.name=adamw")
    if optim.lr is None and (optim.relative or lr is None):
        return RELATIVE, True, f"{key}.lr"
    return lr, optim.relative, named


def peak_rates(model: nn.Module, method: Method, optim: OptimizerSettings, lr: float, relative: bool) -> Rates:
    """The rates of all groups, from that of what the method trains."""
    if not relative:
        return Rates(optim, lr, lr)
    return Rates(optim, lr, PLAIN if method.lr is None else method.lr, movements(model))


def grouped(model: nn.Module, rates: Rates) -> dict[Kind, list[nn.Parameter]]:
    """The parameters that train, by their kind."""
    head = {id(p) for p in h.parameters()} if (h := roles.head(model)) is not None else set()
    muon = takes_muon(model, h) if rates.optim.name == "muon" else set()
    second = second_factors(model) if rates.optim.lr_ratio != 1 else set()
    groups: dict[Kind, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = Kind(id(p) in head, p.ndim > 1, id(p) in muon, id(p) in second, (rates.movements or {}).get(name))
            groups.setdefault(kind, []).append(p)
    return groups


def optimizer_groups(model: nn.Module, rates: Rates, key: str) -> list[dict[str, Any]]:
    """The groups as torch's optimizers take them: the head has its own rate, and only matrices decay.

    LoRA+ (arXiv 2402.12354): the rate of every B of a pair B A is `optim.lr_ratio` times that of its A.

    Args:
        key: of `optim` in the configuration, for the error.

    Raises:
        UsageError: lr_ratio is set, and of what trains outside the head nothing is such a B; or rates are relative, and
            nothing is a factor.
    """
    groups, optim = grouped(model, rates), rates.optim
    body = [kind for kind in groups if not kind.head]
    if optim.lr_ratio != 1 and body and not any(kind.second for kind in body):
        why = "is for the B of pairs B A, as LoRA has them, and none trains here; set it to 1, or take method=lora"
        raise UsageError(f"{key}.lr_ratio={optim.lr_ratio:g}: {why}")
    if body and rates.movements == {}:
        why = "is for tensors of the layers that a method rewrote, and none of them trains here; drop it"
        raise UsageError(f"{key}.relative=true: {why}")
    return [
        {
            "params": parameters,
            "lr": rates.of(kind),
            "weight_decay": optim.weight_decay if kind.matrix else 0.0,
            **({"muon": kind.muon} if optim.name == "muon" else {}),
        }
        for kind, parameters in groups.items()
    ]


def second_factors(model: nn.Module) -> set[int]:
    """The ids of every B (m, r) of pairs B A: those of peft's LoRA layers, and of our low-rank deltas."""
    pairs = [module.lora_B for module in model.modules() if isinstance(getattr(module, "lora_B", None), nn.ModuleDict)]
    deltas = [module.left for module in model.modules() if isinstance(module, DeltaLinear) and module.left is not None]
    return {id(layer.weight) for pair in pairs for layer in pair.values()} | {id(left) for left in deltas}
