"""`apply` runs a method on a model, in place, and records what it did as `model.recombined`."""

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple
from weakref import ref

from torch import nn

from recombine.core.budget import Budget, Room, mixes, solve
from recombine.core.calibration import Losses
from recombine.core.checks import check_call, check_fields, check_layers, checked, fields_as_typed
from recombine.core.digesting import calibrate
from recombine.core.memory import Memory, device_of
from recombine.core.method import Method
from recombine.core.places import kept_around
from recombine.core.rollback import unchanged_on_failure
from recombine.core.sites import Site, parent
from recombine.core.tied import declare_tied
from recombine.core.untouched import Mark, remember
from recombine.errors import UsageError, did_you_mean
from recombine.layers.packed import entries
from recombine.models import rebuild, roles
from recombine.models.wrappers import unwrapped

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """One method that was applied: the name of its class, its fields, and what `to_spec` gave for its layers."""

    method: str
    fields: dict
    layers: dict


@dataclass
class Record:
    """What was done to a model.

    steps: the methods in the order in which they were applied: a compressor, then an adapter.
    targets: role of every rewritten module, by module name.
    dense: number of weights that the target layers had before, without biases.
    total: number of parameters that the whole model had before, with its head.
    untouched: names of the parameters that still hold the pretrained values.
    trainable: names of the parameters that the last method trains.
    blocks: indices of the original blocks that are left; None: all.
    marks: of the untouched parameters, by which a change of their values is found.
    architecture: how the model before is built without its weights; None: that is not known.
    frozen: names of the parameters that were frozen before the first method; merging freezes them again.
    notes: what was adapted to the layers, a sentence each.
    bits: of the layers that `quantize` packs with bits of their own, by module name; None: stays in float.
    """

    steps: list[Step] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)
    dense: int = 0
    total: int = 0
    untouched: set[str] = field(default_factory=set)
    trainable: set[str] = field(default_factory=set)
    blocks: list[int] | None = None
    marks: dict[str, Mark] = field(default_factory=dict)
    architecture: dict[str, Any] | None = None
    frozen: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    bits: dict[str, int | None] = field(default_factory=dict)


def apply(
    model: nn.Module,
    method: Method,
    budget: Budget | str | None = None,
    losses: Losses | None = None,
    memory: Memory | str | None = None,
):
    """Rewrites `model` with `method`, in place, and returns it.

    Afterwards only what the method trains and the classification head, where there is one, are trainable. A model that
    one method has compressed can be adapted by another: apply the second to what the first returned. The record of what
    was done is `model.recombined`. Forward and backward hooks of a layer move to the new one.

    Args:
        model: what torch.compile gave stands for the model inside it.
        budget: a `Budget` or its word: "retained_50", "bytes_50", "trainable_150k", "energy_95" or "memory_1200mb".
        losses: for methods that calibrate. Each call yields one task loss per calibration batch, with its graph, and
            the same ones as every other call.
        memory: what statistics and factors may take at once, such as "8gb"; None: half of what is free. With less,
            `losses` is called more often, and factors wait on disk; the result is the same. `Memory` says where.

    Raises:
        UsageError: a field is out of range, the model lacks a role, the budget cannot be met, or the memory does not
            hold one layer's statistics.

    Whatever is raised, Ctrl-C included, the model is as it was.
    """
    check_call(model, method)
    inner, losses, budget = unwrapped(model), checked(losses), Budget.of(budget)
    with unchanged_on_failure(inner):
        method = method.settled(budget.kind, losses is not None)  # the caller's keeps its fields, and no factors
        done = False
        try:
            rewritten(inner, method, budget, losses, Memory.of(memory))
            done = True
        finally:
            method.kept.close(done)
    return model


def rewritten(model: nn.Module, method: Method, budget: Budget, losses: Losses | None, memory: Memory) -> None:
    """`apply` on what has been checked, without its way back."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    sites = prepare(model, method, budget, losses, memory)
    record = started_record(model, sites, frozen)
    for note in method.notes(sites):
        log.warning("note: %s", note)
        record.notes.append(note)
    old = getattr(model, "recombined", None)
    before = {  # by identity: a weak reference, since a new parameter may get the place of one that is gone
        id(p): (ref(p), p.data_ptr(), p._version)
        for name, p in model.named_parameters()
        if old is None or name in old.untouched
    }
    model.requires_grad_(False)
    with kept_around(model):
        method.rewrite(model, sites, losses)
    if (head := roles.head(model)) is not None:
        head.requires_grad_(True)
    model.train(model.training)  # the new layers follow
    if method.blocks is None:  # a pattern may also name what the method cannot rewrite
        targets = {site.name: site.role for site in sites}
    else:
        targets = roles.find(model, method.targets, nn.Module)
    replaced = {parent(name) for name in targets}  # a fused qkv that is split by now counts as q, k and v
    record.targets = {name: role for name, role in record.targets.items() if name not in replaced} | targets
    record.blocks = record.blocks if method.blocks is None else method.blocks
    record.bits = record.bits | method.bits
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
    remember(model, record)
    model.recombined = record
    declare_tied(model)


def prepare(model: nn.Module, method: Method, budget: Budget, losses: Losses | None, memory: Memory) -> list[Site]:
    """The first half of `apply`: makes the method ready to rewrite; returns its target layers.

    The method is calibrated and holds the solved budget. A fused qkv is split where it names q, k or v; the model is
    not changed otherwise.

    Raises:
        UsageError: as in `apply`.
    """
    sites = find_sites(model, method)
    with kept_around(model):
        roles.split_fused(model, method.targets)
    sites = [Site(name, role, model.get_submodule(name)) for name, role, _ in sites]
    method.memory, method.kept = memory, memory.store(device_of(model))
    with fields_as_typed(method):
        method.before_statistics(model, sites, losses)
        if early := not mixes(budget) and budget.kind != "none" and not method.sizes_need_statistics:
            solve(method, model, sites, budget)
        if kinds := method.statistics_needed():
            calibrate(model, method, sites, losses, kinds)
        method.before_budget(model, sites, losses)
        if mixes(budget):
            method.bits = method.mix(model, sites, Room.of(budget, model, sites), losses)
        elif budget.kind != "none" and not early:
            solve(method, model, sites, budget)
        method.after_budget(model, sites, losses)
    return sites


def find_sites(model: nn.Module, method: Method) -> list[Site]:
    """The method's target layers in model order, checked against its fields. The model is not changed.

    Where the method names q, k or v and the model has one fused layer, the site's module is a view of that layer's
    rows.

    Raises:
        UsageError: the model lacks a role, a field has another type or is out of range for these layers, or a layer is
            not what it seems.
    """
    check_fields(method, method.key)
    roles_by_name = roles.find(model, method.targets, method.target_types, f"{method.key}.targets")
    if not roles_by_name:
        typed, has = ",".join(method.targets), " ".join(roles.role_names(model))
        raise UsageError(f"{method.key}.targets=[{typed}]: {type(model).__name__} has none of them; it has {has}")
    sites = [Site(name, role, roles.layer_at(model, name)) for name, role in roles_by_name.items()]
    check_layers(model, method, sites)
    with fields_as_typed(method):
        method.survey(model, sites)
        method.check(sites)
    return sites


def started_record(model: nn.Module, sites: list[Site], frozen: set[str]) -> Record:
    """The record of a model as it stands, with the sizes of the layers that are rewritten next added.

    Args:
        frozen: of the record, where this is the first method.
    """
    old = getattr(model, "recombined", None)
    counted = set() if old is None else old.targets.keys()
    dense = sum(site.module.weight.numel() for site in sites if not {site.name, parent(site.name)} & counted)
    if old is not None:
        return replace(old, dense=old.dense + dense, steps=list(old.steps), notes=list(old.notes))
    total = sum(entries(model).values())
    return Record(dense=dense, total=total, architecture=rebuild.architecture(model), frozen=frozen)


def finish(model: nn.Module, method: Method, alone: bool) -> None:
    """Ends the distillation: the method folds away what only that needed, and the record follows.

    Args:
        alone: no other method is applied next, so the weights that this one trains stay apart.
    """
    record = model.recombined
    untouched = {id(p): ref(p) for name, p in model.named_parameters() if name in record.untouched}
    with kept_around(model):
        method.on_distillation_end(model, alone)
    declare_tied(model)
    targets = [name for name in roles.find(model, method.targets, nn.Module) if name in record.targets]
    record.steps[-1] = record.steps[-1]._replace(layers=method.to_spec(model, targets))
    record.untouched = {name for name, p in model.named_parameters() if id(p) in untouched and untouched[id(p)]() is p}
    record.trainable &= {name for name, _ in model.named_parameters()}
    record.marks = {name: mark for name, mark in record.marks.items() if name in record.untouched}


def train_only(model: nn.Module, names: set[str]) -> None:
    """Makes exactly these parameters trainable. They no longer count as untouched in the record.

    Raises:
        UsageError: the model has no parameter of such a name.
    """
    model, names, parameters = unwrapped(model), set(names), dict(unwrapped(model).named_parameters())
    if name := min(names - parameters.keys(), default=None):
        near = did_you_mean(name, [*parameters])
        raise UsageError(f"train_only: the model has no parameter {name}; {near}see model.named_parameters()")
    for name, p in parameters.items():
        p.requires_grad_(name in names)
    if hasattr(model, "recombined"):
        model.recombined.untouched -= names
