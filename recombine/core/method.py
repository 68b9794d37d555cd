"""The contract of a method: a dataclass whose fields are its whole configuration and whose hooks rewrite a model.

A weight is trainable if and only if it has `requires_grad`. `recombine.core.rewrite.apply` runs a method on a model and
records what it did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from recombine.core.calibration import Losses, Stats
from recombine.core.kept import Kept
from recombine.core.layer_kinds import layer_class
from recombine.core.memory import Memory
from recombine.core.sites import Site
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.models import roles
from recombine.runtime import progress
from recombine.runtime.kinds import Rate


@dataclass(kw_only=True)
class Method:
    """Rewrites the target layers of a pretrained model in place. Most methods write `recombine` and `sizes` only.

    The hooks are called in this order:

        apply                   settled                     another with open fields decided
                                survey                      what the layers do not say, such as the number of heads
                                check                       the fields, against the target layers
                                before_statistics           learns without them what the sizes depend on
                                statistics_needed           then the statistics are collected into `self.stats`
                                groups, digest              they are worked off group by group, and dropped
                                before_budget               learns what the sizes depend on
                                budget_values, sizes        for a budget: `budget_fields` names the field it sets
                                after_budget                learns what depends on the sizes
                                rewrite (recombine)         puts the new layers in and marks what trains
                                to_spec                     describes them for the checkpoint
        distillation            distillation_parameters     what trains in it
                                on_distillation_step, _end  before each step, and after the last
        training                penalty                     at each step, added to the loss
        loading a checkpoint    from_spec                   the same layers again, empty

    Args:
        targets: roles of the layers to rewrite: q, k, v, o, up, down, gate, or qkv for the fused projection where
            there is one; or all-linear, ends of module names, globs or regular expressions. A target that ends in ?
            (gate?) is left out where the model has none. A string is one target.
        lr: learning rate of what trains, where the optimizer sets none; None: a relative rate (`training.rates`).
    """

    targets: tuple[str, ...] = ("q", "k", "v", "o", "up", "down", "gate?")
    lr: Rate | None = 1e-3

    # What a method can do
    abstract: ClassVar[bool] = False  # a base class of methods, none itself: `class Base(Method, abstract=True)`
    budget_fields: ClassVar[dict[str, str]] = {}  # kind of budget -> the field, or field.entry, that it sets
    conflicting_fields: ClassVar[tuple[str, ...]] = ()  # optional fields that each set the size alone
    compresses: ClassVar[bool] = False  # can hold the target layers in fewer weights than they have
    target_types: ClassVar[tuple[type, ...]] = (nn.Linear,)  # the layers that it can rewrite
    sizes_need_statistics: ClassVar[bool] = True  # False: a budget is solved first, so `digest` knows the sizes
    paper: ClassVar[dict[str, Any]] = {}  # fields -> values, or groups of them, where ours differs
    mixes: ClassVar[dict[str, Any]] = {}  # fields under which it chooses the bits of its layers too, by `mix`
    needs_trained_head: ClassVar[bool] = False  # looks at the task's loss, so a classifier must be fitted before it

    def __init_subclass__(cls, abstract: bool = False):
        super().__init_subclass__()
        cls.abstract = abstract

    def __post_init__(self):
        self.targets = (one,) if isinstance(one := self.targets, str) and one else one  # as peft takes it
        self.label = type(self).__name__.lower()  # how messages call it; the runner knows what the user typed
        self.key = "method"  # the node of the configuration that its fields stand in, for messages
        self.stats: dict[str, Stats] = {}  # what `statistics_needed` asked for, by site name, of one model
        self.memory = Memory()  # what the statistics and `kept` may take
        self.kept = Kept()  # what `digest` gave, by the name of a group's first layer, of one model
        self.bits: dict[str, int | None] = {}  # of the sites by name, once `mix` chose them
        self.blocks: list[int] | None = None  # the blocks that `rewrite` leaves, if not all

    def copy(self, **changes: Any) -> Self:
        """Another with these fields changed, which messages call the same."""
        other = replace(self, **changes)
        other.label, other.key = self.label, self.key
        return other

    def settled(self, kind: str, calibrates: bool) -> Self:
        """Another whose open fields are decided. With `as_paper`, those that have their default are as in `paper`.

        Args:
            kind: of the budget that limits the method.
            calibrates: there is calibration data.
        """
        paper = self.paper if getattr(self, "as_paper", False) else {}
        groups = {name: replace(getattr(self, name), **v) for name, v in paper.items() if isinstance(v, dict)}
        plain = paper.keys() - groups.keys()
        plain = {name: paper[name] for name in plain if getattr(self, name) == getattr(type(self), name)}
        return self.copy(**groups, **plain)

    # Before the rewriting: fields and data
    def contradiction(self, key: str) -> str | None:
        """Why the fields do not go together; None: they do. key: of the node that they stand in."""
        given = [f"{key}.{n}={value}" for n in self.conflicting_fields if (value := getattr(self, n)) is not None]
        return f"{' and '.join(given)} both set the size: drop one of them" if len(given) > 1 else None

    def survey(self, model: nn.Module, sites: list[Site]) -> None:
        """Notes what the layers alone do not say, such as the number of heads; refuses modules that it cannot cut."""

    def check(self, sites: list[Site]) -> None:
        """Checks the fields against the target layers; raises UsageError for one that is out of range."""

    def before_statistics(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        """Learns from model and data what `sizes` depends on, where no statistics are needed for that."""

    def statistics_needed(self) -> set[str]:
        """Kinds of statistics to collect into `self.stats`, out of `calibration.KINDS`: {"inputs"}, for example."""
        return set()

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        """The layers that are digested together, group by group."""
        return [[site] for site in sites]

    def digest(self, group: list[Site]) -> dict[str, Tensor] | None:
        """All that is needed of a group beside its weights, of which the statistics are dropped; None: they stay."""
        return None

    def digested(self, group: list[Site]) -> Mapping[str, Tensor]:
        """What `digest` gives for a group, computed once. Matrices may lie in a file: each use reads them."""
        if (name := group[0].name) not in self.kept:
            self.kept[name] = self.digest(group)
        return self.kept[name]

    def before_budget(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        """Learns from model and data what `sizes` depends on. `self.stats` is filled, or digested, by then."""

    def after_budget(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        """Learns from model and data what depends on the solved budget. From then on `sizes` is exact."""

    def notes(self, sites: list[Site]) -> list[str]:
        """What of the fields is adapted to layers that they do not fit, a sentence each; said once."""
        return []

    # Sizes, in closed form
    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        """(stored, trained) weights of the rewritten target layers, without biases. Nothing is built."""
        raise NotImplementedError(type(self).__name__)

    def retained_weights(self, sites: list[Site]) -> int:
        """Stored weights that are left once training is over and all is folded. A retained budget limits these."""
        return self.sizes(sites)[0]

    def budget_values(self, field: str, sites: list[Site]) -> Sequence:
        """The values that a budget may give to this field, from the smallest model to the largest."""
        raise NotImplementedError(type(self).__name__)

    def mix(self, model: nn.Module, sites: list[Site], room: Any, losses: Losses | None) -> dict[str, int | None]:
        """Chooses rank and bits of every layer together; the bits by site name. room: a `budget.Room`."""
        why = "gives its layers no ranks one by one, so they have no bits of their own; say quantize.bits=8 or 4"
        raise UsageError(f"quantize.bits=mix: {self.label} {why}")

    def rewrite(self, model: nn.Module, sites: list[Site], losses: Losses | None = None) -> None:
        """Replaces the target layers of a frozen model, in place, and marks what trains.

        Override it where layers share tensors or modules are cut; otherwise `recombine` is enough.

        Args:
            losses: one task loss with its graph per calibration batch, each time it is called; None: no data is given.
        """
        for site in progress.of(sites, "rewriting", "layers"):
            self.kept.put(model, site.name, self.recombine(site))

    def recombine(self, site: Site) -> nn.Module:
        """The layer that replaces this one. Most methods write only this and `sizes`."""
        raise NotImplementedError(type(self).__name__)

    def to_spec(self, model: nn.Module, names: list[str]) -> dict[str, dict]:
        """What `from_spec` needs to shape the rewritten layers again, by module name; JSON can hold it."""
        layers = {name: layer for name in names if isinstance(layer := model.get_submodule(name), RecombinedLinear)}
        return {name: {"kind": type(layer).__name__, "spec": layer.spec()} for name, layer in layers.items()}

    def from_spec(self, model: nn.Module, layers: dict[str, dict]) -> None:
        """Puts the layers that `to_spec` described into a pretrained model. They are empty: nothing is factorised."""
        for name, spec in layers.items():
            linear = model.get_submodule(name)
            layer = layer_class(spec["kind"]).empty(**spec["spec"]).to(linear.weight)
            model.set_submodule(name, layer.share_bias_with(linear))

    # Training
    def penalty(self, model: nn.Module) -> Tensor | float:
        """A scalar that is added to the training loss at every step."""
        return 0.0

    def distillation_parameters(self, model: nn.Module) -> set[str]:
        """Names of the parameters that distillation trains: factors, norms and biases (CRISP Alg. 4).

        Paper: line 8 of the algorithm updates B and A alone. Here: also what has one dimension, outside the head.
        """
        factors = {id(p) for m in model.modules() if isinstance(m, RecombinedLinear) for p in m.parameters()}
        head = {id(p) for p in h.parameters()} if (h := roles.head(model)) is not None else set()
        return {n for n, p in model.named_parameters() if id(p) in factors or p.ndim <= 1 and id(p) not in head}

    def on_distillation_step(self, model: nn.Module, share: float) -> bool:
        """Moves a schedule before every step of the distillation.

        Args:
            share: of the steps that are done, in [0, 1].

        Returns:
            False while the model has not yet reached its final form, so that it cannot be the best model of the run.
        """
        return True

    def on_distillation_end(self, model: nn.Module, alone: bool) -> None:
        """Folds away what only the distillation needed.

        Args:
            alone: no other method is applied next.
        """


def method_classes() -> dict[str, type[Method]]:
    """Every method by the name of its class, those of the user's own modules included."""
    known, new = {}, [Method]
    while new:
        new = [subclass for cls in new for subclass in cls.__subclasses__()]
        known |= {cls.__name__: cls for cls in new if not cls.abstract}
    return known


def need_losses(method: Method, losses: Losses | None) -> None:
    """Checks that there is something to calibrate with.

    Raises:
        UsageError: losses is None.
    """
    if losses is None:
        why = "give apply(..., losses=), which yields a task loss per batch when called"
        raise UsageError(f"{type(method).__name__} calibrates: {why}")


def need(ok: bool, method: Method, name: str, why: str) -> None:
    """Checks one field of a method, by its name. why: the reason and the fix, which end the line of the error.

    Raises:
        UsageError: not ok.
    """
    if not ok:
        assert name in {f.name for f in fields(method)}
        raise UsageError(f"method.{name}={getattr(method, name)!r}: {why}")
