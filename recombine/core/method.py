"""The contract of a method, and `apply`, which runs one on a model and writes down what it did.

A Method rewrites the linear layers of a pretrained model in place. Its dataclass fields are its whole
configuration. What trains is whatever has `requires_grad`.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import ClassVar, NamedTuple
from weakref import ref

from torch import Tensor, nn

from recombine.core.budget import Budget, solve
from recombine.core.calibration import Losses, Stats, collect
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.models import roles
from recombine.models.fused_qkv import SplitQKV, fuse_qkv
from recombine.runtime import progress


class Site(NamedTuple):
    """One targeted layer: its module name, its role (q, k, v, o, up, down, gate, qkv ...) and itself."""

    name: str
    role: str
    linear: nn.Linear


@dataclass(kw_only=True)
class Method:
    """Rewrites a model in place.

    Args:
        targets: role names: q k v o up down gate, or qkv for the fused projection where there is one. A role that
            ends in ? is left out where the model has none.
        lr: learning rate of the weights it trains, used where the optimizer's own is not set.
    """

    targets: tuple[str, ...] = ("q", "k", "v", "o", "up", "down", "gate?")
    lr: float = 1e-3

    knobs: ClassVar[dict[str, str]] = {}  # kind of budget -> the field that `budget.solve` sets for it
    rivals: ClassVar[tuple[str, ...]] = ()  # optional fields that each set the size alone
    compresses: ClassVar[bool] = False  # can hold the target layers in fewer weights than they have
    on: ClassVar[tuple[type, ...]] = (nn.Linear,)  # the layers it can rewrite
    judges: ClassVar[bool] = False  # looks at the task's loss, so a classifier must be fitted before it

    def __post_init__(self):
        self.stats: dict[str, Stats] = {}  # what `wants` asked for, by site name, for one model
        self.blocks: list[int] | None = None  # the blocks that `rewrite` leaves, if not all

    def check(self, sites: list[Site]) -> None:
        """Raises UsageError for a field that is out of range for these layers."""

    def wants(self) -> set[str]:
        """The statistics (of `calibration.KINDS`) that are collected into `self.stats` before anything else."""
        return set()

    def prepare(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        """After the statistics and before the budget is solved: what has to be learnt on data to know the sizes."""

    def learn(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        """After the budget is solved: what has to be learnt on data under it. From then on `sizes` is exact."""

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        """(stored, trained) weights of the target layers without biases, in closed form: nothing is built."""
        raise NotImplementedError(type(self).__name__)

    def kept(self, sites: list[Site]) -> int:
        """Of the stored weights those that are left when all is trained and folded: what a retained budget counts."""
        return self.sizes(sites)[0]

    def choices(self, knob: str, sites: list[Site]) -> Sequence:
        """The values of a knob, from the smallest model to the largest."""
        raise NotImplementedError(type(self).__name__)

    def rewrite(self, model: nn.Module, sites: list[Site], losses: Losses | None = None) -> None:
        """Replaces the target layers of a frozen model and marks what trains. Override to share or prune."""
        for site in progress.of(sites, "rewriting", "layers"):
            model.set_submodule(site.name, self.recombine(site))

    def recombine(self, site: Site) -> nn.Module:
        """The replacement of one layer; most methods write only this."""
        raise NotImplementedError(type(self).__name__)

    def describe(self, model: nn.Module, names: list[str]) -> dict[str, dict]:
        """JSON-able: what `restore` needs to shape the rewritten model again."""
        layers = {name: model.get_submodule(name) for name in names}
        return {
            name: {"kind": type(layer).__name__, "spec": layer.spec()}
            for name, layer in layers.items()
            if isinstance(layer, RecombinedLinear)
        }

    def restore(self, model: nn.Module, layers: dict[str, dict]) -> None:
        """Rebuilds what `describe` described, empty, on the model before it: no factorisation is run again."""
        for name, spec in layers.items():
            linear = model.get_submodule(name)
            layer = spec_class(spec["kind"]).empty(**spec["spec"]).to(linear.weight)
            model.set_submodule(name, layer.adopt(linear))

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Added to the training loss."""
        return 0.0

    def distils(self, model: nn.Module) -> set[str]:
        """Names of the parameters that distillation trains: the factors, norms and biases (CRISP Alg. 4)."""
        factors = {id(p) for m in model.modules() if isinstance(m, RecombinedLinear) for p in m.parameters()}
        head = {id(p) for p in h.parameters()} if (h := roles.head(model)) is not None else set()
        return {n for n, p in model.named_parameters() if id(p) in factors or p.ndim <= 1 and id(p) not in head}

    def advance(self, model: nn.Module, share: float) -> bool:
        """Before every step of the distillation, with the share of it that is done: moves a schedule.

        False while the model has not yet the form that it will be kept in.
        """
        return True

    def finish(self, model: nn.Module, alone: bool) -> None:
        """After the distillation: folds away what only that needed. alone: no other method comes next."""


class Step(NamedTuple):
    """One method that was applied: its class, its fields, and what it says of the layers it made."""

    method: str
    fields: dict
    layers: dict


@dataclass
class Record:
    """What was done to a model, kept as `model.recombined`."""

    steps: list[Step] = field(default_factory=list)  # in order: a compressor, then what adapts
    targets: dict[str, str] = field(default_factory=dict)  # rewritten module -> role
    dense: int = 0  # weights the target layers had, without biases
    total: int = 0  # parameters the whole model had, head included
    own: set[str] = field(default_factory=set)  # parameters that still hold the pretrained values
    trains: set[str] = field(default_factory=set)  # parameters that the last method trains
    blocks: list[int] | None = None  # which of the original blocks are left; None: all


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
    method = replace(method)  # the caller's keeps its fields, and no factors of this model
    budget = Budget.parse(budget) if isinstance(budget, str) else budget or Budget()
    split = frozenset(name for name, module in model.named_modules() if isinstance(module, SplitQKV))
    try:
        sites = find_sites(model, method)
        if wanted := method.wants():
            calibrate(model, method, sites, losses, wanted)
        method.prepare(model, sites, losses)
        if budget.kind != "none":
            solve(method, model, sites, budget)
        method.learn(model, sites, losses)
    except UsageError:
        fuse_qkv(model, keep=split)  # what was split for the targets q, k and v
        raise
    old = getattr(model, "recombined", None)
    counted = set() if old is None else old.targets.keys()
    record = Record(
        dense=sum(site.linear.weight.numel() for site in sites if not {site.name, parent(site.name)} & counted),
        total=sum(p.numel() for p in model.parameters()),
    )
    if old is not None:
        record = replace(old, dense=old.dense + record.dense, steps=list(old.steps))
    before = {  # by identity: a weak reference, since a new parameter may get the place of one that is gone
        id(p): (ref(p), p.data_ptr(), p._version) for n, p in model.named_parameters() if old is None or n in old.own
    }
    model.requires_grad_(False)
    method.rewrite(model, sites, losses)
    if (head := roles.head(model)) is not None:
        head.requires_grad_(True)
    model.train(model.training)  # the new layers follow
    targets = roles.find(model, method.targets, nn.Module)
    whole = {parent(name) for name in targets}  # a fused qkv that is split by now counts as q, k and v
    record.targets = {name: role for name, role in record.targets.items() if name not in whole} | targets
    record.blocks = record.blocks if method.blocks is None else method.blocks
    record.steps.append(Step(type(method).__name__, asdict(method), method.describe(model, list(targets))))
    record.own = {
        name
        for name, p in model.named_parameters()
        if (known := before.get(id(p))) is not None
        and known[0]() is p
        and known[1:] == (p.data_ptr(), p._version)
        and not p.requires_grad
    }
    record.trains = {name for name, p in model.named_parameters() if p.requires_grad}
    model.recombined = record
    return model


def calibrate(model: nn.Module, method: Method, sites: list[Site], losses: Losses | None, wanted: set[str]) -> None:
    """Collects what the method wants to know of the data."""
    need_losses(method, losses)
    method.stats = collect(model, sites, losses, wanted)


def finish(model: nn.Module, method: Method, alone: bool) -> None:
    """After the distillation: lets the method fold away what only that needed, and writes it down.

    alone: no other method comes after it, so the weights it trains are kept apart.
    """
    record = model.recombined
    own = {id(p): ref(p) for name, p in model.named_parameters() if name in record.own}
    method.finish(model, alone)
    targets = roles.find(model, method.targets, nn.Module)
    record.steps[-1] = record.steps[-1]._replace(layers=method.describe(model, list(targets)))
    record.own = {name for name, p in model.named_parameters() if id(p) in own and own[id(p)]() is p}
    record.trains &= {name for name, _ in model.named_parameters()}


def parent(name: str) -> str:
    """The name of the module that holds this one."""
    return name.rpartition(".")[0]


def find_sites(model: nn.Module, method: Method) -> list[Site]:
    """The method's target layers in model order, checked against its fields; a fused qkv is split for q, k and v."""
    found = roles.find(model, method.targets, method.on)
    sites = [Site(name, role, model.get_submodule(name)) for name, role in found.items()]
    method.check(sites)
    return sites


def consecutive(sites: list[Site], size: Callable[[str], int]) -> list[list[Site]]:
    """Runs of size(role) consecutive layers of one role and shape; the last run of a role may be shorter."""
    alike = defaultdict(list)
    for site in sites:
        alike[site.role, site.linear.weight.shape].append(site)
    return [run[i : i + size(role)] for (role, _), run in alike.items() for i in range(0, len(run), size(role))]


def train_only(model: nn.Module, names: set[str]) -> None:
    """Trains exactly these parameters. What trained before no longer counts as the backbone's own."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    if hasattr(model, "recombined"):
        model.recombined.own -= names


def spec_class(kind: str) -> type[RecombinedLinear]:
    """The layer class of that name."""
    return next(cls for cls in RecombinedLinear.__subclasses__() if cls.__name__ == kind)


def need_losses(method: Method, losses: Losses | None) -> None:
    """Raises UsageError where there is nothing to calibrate with."""
    if losses is None:
        name = type(method).__name__
        raise UsageError(f"{name} calibrates: give apply(..., losses=), which yields a task loss per batch when called")


def need(ok: bool, method: Method, name: str, why: str) -> None:
    """Raises UsageError for a field of the method unless ok."""
    if not ok:
        assert name in {f.name for f in fields(method)}
        raise UsageError(f"method.{name}={getattr(method, name)!r}: {why}")
