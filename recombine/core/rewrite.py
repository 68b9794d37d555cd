"""`apply` runs a method on a model in place and writes down what it did as `model.recombined`."""

from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple
from weakref import ref

from torch import nn

from recombine.core.budget import Budget, solve
from recombine.core.calibration import Losses, collect
from recombine.core.method import Method, Site, need_losses
from recombine.errors import UsageError
from recombine.models import roles
from recombine.models.fused_qkv import SplitQKV, fuse, layer_at


class Step(NamedTuple):
    """One method that was applied: the name of its class, its fields, and what `to_spec` says of its layers."""

    method: str
    fields: dict
    layers: dict


@dataclass
class Record:
    """What was done to a model.

    steps: in order: a compressor, then what adapts.
    targets: rewritten module -> role.
    dense: weights that the target layers had, without biases.
    total: parameters of the whole model as it came, head included.
    untouched: names of the parameters that still hold the pretrained values.
    trainable: names of the parameters that the last method trains.
    blocks: which of the original blocks are left; None: all.
    """

    steps: list[Step] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)
    dense: int = 0
    total: int = 0
    untouched: set[str] = field(default_factory=set)
    trainable: set[str] = field(default_factory=set)
    blocks: list[int] | None = None


def apply(model: nn.Module, method: Method, budget: Budget | str | None = None, losses: Losses | None = None):
    """Rewrites `model` in place with `method` and returns it: factors and adapters in, the rest frozen.

    A model that was compressed by one method can be adapted by another: apply the second to what the first returned.
    The classification head, where the model has one, stays trainable. `model.recombined` tells what was done.

    Args:
        budget: a `Budget` or its word ("retained_50", "trainable_150k", "energy_95", "memory_1200mb").
        losses: for methods that calibrate: each call yields one task loss with its graph per calibration batch.

    Raises:
        UsageError: a bad field, a role the model lacks, a budget that cannot be met; the model is unchanged.
    """
    method, sites = prepare(model, method, budget, losses)
    record = started_record(model, sites)
    old = getattr(model, "recombined", None)
    before = {  # by identity: a weak reference, since a new parameter may get the place of one that is gone
        id(p): (ref(p), p.data_ptr(), p._version)
        for name, p in model.named_parameters()
        if old is None or name in old.untouched
    }
    model.requires_grad_(False)
    method.rewrite(model, sites, losses)
    if (head := roles.head(model)) is not None:
        head.requires_grad_(True)
    model.train(model.training)  # the new layers follow
    targets = roles.find(model, method.targets, nn.Module)
    replaced = {parent(name) for name in targets}  # a fused qkv that is split by now counts as q, k and v
    record.targets = {name: role for name, role in record.targets.items() if name not in replaced} | targets
    record.blocks = record.blocks if method.blocks is None else method.blocks
    record.steps.append(Step(type(method).__name__, asdict(method), method.to_spec(model, list(targets))))
    record.untouched = {
        name
        for name, p in model.named_parameters()
        if (known := before.get(id(p))) is not None
        and known[0]() is p
        and known[1:] == (p.data_ptr(), p._version)
        and not p.requires_grad
    }
    record.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.recombined = record
    return model


def prepare(
    model: nn.Module, method: Method, budget: Budget | str | None, losses: Losses | None
) -> tuple[Method, list[Site]]:
    """A copy of the method with everything known that `rewrite` needs, and its sites: all of `apply` that comes first.

    A fused qkv is split where the method names q, k or v; otherwise the model is as it was.

    Raises:
        UsageError: as `apply`; the model is unchanged.
    """
    method = replace(method)  # the caller's keeps its fields, and no factors of this model
    budget = Budget.parse(budget) if isinstance(budget, str) else budget or Budget()
    sites = find_sites(model, method)
    was_split = frozenset(name for name, module in model.named_modules() if isinstance(module, SplitQKV))
    try:
        roles.split_fused(model, method.targets)
        sites = [Site(name, role, model.get_submodule(name)) for name, role, _ in sites]
        if kinds := method.statistics_needed():
            calibrate(model, method, sites, losses, kinds)
        method.before_budget(model, sites, losses)
        if budget.kind != "none":
            solve(method, model, sites, budget)
        method.after_budget(model, sites, losses)
    except UsageError:
        fuse(model, keep=was_split)
        raise
    return method, sites


def calibrate(model: nn.Module, method: Method, sites: list[Site], losses: Losses | None, kinds: set[str]) -> None:
    """Collects statistics of these kinds into the method's `stats`."""
    need_losses(method, losses)
    method.stats = collect(model, sites, losses, kinds)


def find_sites(model: nn.Module, method: Method) -> list[Site]:
    """The method's target layers in model order, checked against its fields. The model is not changed.

    Where q, k or v is named and the model has them as one fused layer, a site's module is a view of its rows.

    Raises:
        UsageError: a role that the model lacks, or a field that is out of range for these layers.
    """
    roles_by_name = roles.find(model, method.targets, method.target_types)
    sites = [Site(name, role, layer_at(model, name)) for name, role in roles_by_name.items()]
    method.check(sites)
    return sites


def started_record(model: nn.Module, sites: list[Site]) -> Record:
    """The record of a model as it stands, with the sizes of the layers that are about to be rewritten."""
    old = getattr(model, "recombined", None)
    counted = set() if old is None else old.targets.keys()
    dense = sum(site.module.weight.numel() for site in sites if not {site.name, parent(site.name)} & counted)
    if old is not None:
        return replace(old, dense=old.dense + dense, steps=list(old.steps))
    return Record(dense=dense, total=sum(p.numel() for p in model.parameters()))


def finish(model: nn.Module, method: Method, alone: bool) -> None:
    """After the distillation: lets the method fold away what only that needed, and writes it down.

    alone: no other method comes after it, so the weights it trains are kept apart.
    """
    record = model.recombined
    untouched = {id(p): ref(p) for name, p in model.named_parameters() if name in record.untouched}
    method.on_distillation_end(model, alone)
    targets = roles.find(model, method.targets, nn.Module)
    record.steps[-1] = record.steps[-1]._replace(layers=method.to_spec(model, list(targets)))
    record.untouched = {name for name, p in model.named_parameters() if id(p) in untouched and untouched[id(p)]() is p}
    record.trainable &= {name for name, _ in model.named_parameters()}


def train_only(model: nn.Module, names: set[str]) -> None:
    """Trains exactly these parameters. What trained before no longer counts as untouched."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    if hasattr(model, "recombined"):
        model.recombined.untouched -= names


def parent(name: str) -> str:
    """The name of the module that holds this one."""
    return name.rpartition(".")[0]
