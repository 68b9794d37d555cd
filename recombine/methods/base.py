"""The contract of a method, and `apply`, which runs one on a model and writes down what it did.

A Method rewrites the linear layers of a pretrained model in place. Its dataclass fields are its whole
configuration. What trains is whatever has `requires_grad`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from recombine.budget import Budget, solve
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.models import roles
from recombine.models.split_qkv import fuse_qkv


class Site(NamedTuple):
    """One targeted linear layer: its module name, its role (q, k, v, o, up, down, qkv ...) and itself."""

    name: str
    role: str
    linear: nn.Linear


@dataclass(kw_only=True)
class Method:
    """Rewrites a model in place.

    Args:
        targets: role names: q k v o up down gate, or qkv for the fused projection where there is one.
        lr: learning rate of the weights it trains, used where the optimizer's own is not set.
    """

    targets: tuple[str, ...] = ("q", "k", "v", "o", "up", "down")
    lr: float = 1e-3

    knobs: ClassVar[dict[str, str]] = {}  # kind of budget -> the field that `budget.solve` sets for it
    rivals: ClassVar[tuple[str, ...]] = ()  # optional fields that each set the size alone
    compresses: ClassVar[bool] = False  # can hold the target layers in fewer weights than they have

    def check(self, sites: list[Site]) -> None:
        """Raises UsageError for a field that is out of range for these layers."""

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        """(stored, trained) weights of the target layers without biases, in closed form: nothing is built."""
        raise NotImplementedError(type(self).__name__)

    def choices(self, knob: str, sites: list[Site]) -> Sequence:
        """The values of a knob, from the smallest model to the largest."""
        raise NotImplementedError(type(self).__name__)

    def rewrite(self, model: nn.Module, sites: list[Site], losses: Iterator[Tensor] | None = None) -> None:
        """Replaces the target layers of a frozen model and marks what trains. Override to share or calibrate."""
        for site in sites:
            model.set_submodule(site.name, self.recombine(site))

    def recombine(self, site: Site) -> nn.Module:
        """The replacement of one layer; most methods write only this."""
        raise NotImplementedError(type(self).__name__)

    def restore(self, model: nn.Module, layers: dict[str, dict]) -> None:
        """Rebuilds the layers of a checkpoint, empty, from their specs: no factorisation is run again."""
        for name, spec in layers.items():
            linear = model.get_submodule(name)
            layer = spec_class(spec["kind"]).empty(**spec["spec"]).to(linear.weight)
            if layer.bias is not None:
                layer.bias = linear.bias
            model.set_submodule(name, layer)

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Added to the training loss."""
        return 0.0


@dataclass
class Record:
    """What was done to a model, kept as `model.recombined`."""

    steps: list[tuple[str, dict]] = field(default_factory=list)  # (method class, its fields), in order
    targets: dict[str, str] = field(default_factory=dict)  # rewritten module -> role
    dense: int = 0  # weights the target layers had, without biases
    total: int = 0  # parameters the whole model had, head included
    own: set[str] = field(default_factory=set)  # parameters that still hold the pretrained values
    trains: set[str] = field(default_factory=set)  # parameters that the method trains


def apply(model: nn.Module, method: Method, budget: Budget | str | None = None, losses=None) -> nn.Module:
    """Rewrites `model` in place with `method` and returns it: factors and adapters in, the rest frozen.

    The classification head, where the model has one, stays trainable. `model.recombined` tells what was done.

    Args:
        budget: a `Budget` or its word ("retained_50", "trainable_150k", "energy_95", "memory_1200mb").
        losses: yields one task loss with its graph per calibration batch, for methods that calibrate.

    Raises:
        UsageError: a bad field, a role the model lacks, a budget that cannot be met; the model is unchanged.
    """
    if hasattr(model, "recombined"):
        done = ", ".join(name for name, _ in model.recombined.steps)
        raise UsageError(f"the model is already recombined by {done}: recombine.merge(model) first, or start afresh")
    method = replace(method)  # the caller's keeps its fields, and no factors of this model
    budget = Budget.parse(budget) if isinstance(budget, str) else budget or Budget()
    try:
        sites = find_sites(model, method)
        if budget.kind != "none":
            solve(method, model, sites, budget)
    except UsageError:
        fuse_qkv(model)  # split for the targets q, k and v
        raise
    record = Record(
        steps=[(type(method).__name__, asdict(method))],
        targets={site.name: site.role for site in sites},
        dense=sum(site.linear.weight.numel() for site in sites),
        total=sum(p.numel() for p in model.parameters()),
    )
    before = {id(p): (p.data_ptr(), p._version) for p in model.parameters()}
    model.requires_grad_(False)
    method.rewrite(model, sites, losses)
    if (head := roles.head(model)) is not None:
        head.requires_grad_(True)
    model.train(model.training)  # the new layers follow
    record.own = {
        name
        for name, p in model.named_parameters()
        if before.get(id(p)) == (p.data_ptr(), p._version) and not p.requires_grad
    }
    record.trains = {name for name, p in model.named_parameters() if p.requires_grad}
    model.recombined = record
    return model


def find_sites(model: nn.Module, method: Method) -> list[Site]:
    """The method's target layers in model order, checked against its fields; a fused qkv is split for q, k and v."""
    sites = [Site(name, role, model.get_submodule(name)) for name, role in roles.find(model, method.targets).items()]
    method.check(sites)
    return sites


def train_only(model: nn.Module, names: set[str]) -> None:
    """Trains exactly these parameters. What trained before no longer counts as the backbone's own."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    if hasattr(model, "recombined"):
        model.recombined.own -= names


def spec_class(kind: str) -> type[RecombinedLinear]:
    """The layer class of that name."""
    return next(cls for cls in RecombinedLinear.__subclasses__() if cls.__name__ == kind)


def need(ok: bool, method: Method, name: str, why: str) -> None:
    """Raises UsageError for a field of the method unless ok."""
    if not ok:
        assert name in {f.name for f in fields(method)}
        raise UsageError(f"method.{name}={getattr(method, name)!r}: {why}")
