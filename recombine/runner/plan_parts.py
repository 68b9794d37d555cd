"""What a rehearsed run is told in: its phases, and the stand-ins for its model and its batches."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from recombine import data, models
from recombine.core import footprint, rewrite
from recombine.core.budget import Budget
from recombine.core.footprint import Watch
from recombine.core.memory import Memory
from recombine.core.method import Method
from recombine.core.rollback import unchanged_on_failure
from recombine.data.base import DataModule, TokenModule
from recombine.data.prompted.base import PromptedData
from recombine.errors import UsageError
from recombine.models import roles
from recombine.models.sizes import require_image_size
from recombine.runner import plan_drawing
from recombine.runner.config import RunSpec
from recombine.runner.plan_devices import Cost
from recombine.stages.retrofit import SAMPLES
from recombine.training import objectives
from recombine.training.objectives import Objective, call

if TYPE_CHECKING:
    from recombine.runner.plan_player import Player

BATCHES = 2  # of calibration that are rehearsed; the others cost the same
KEPT: dict[str, tuple[nn.Module, int | None]] = {}
CLASSES = 100  # of data that tell only once they are read


class Phase(NamedTuple):
    """A part of a run. held: bytes by part, all at the same time. cost: of its work; None: how much is not known."""

    name: str
    held: dict[str, int]
    cost: Cost | None

    @property
    def bytes(self) -> int:
        """All parts together."""
        return sum(self.held.values())


@dataclass
class Rehearsal:
    """What a run will take.

    parameters: total, trained and, of the target layers, the share that is retained. phases: in their order.
    digests: a method keeps its statistics and factors to calibration.memory. passes: over the data that its calibration
    is worth; sums: bytes of its statistics that are held at once. None: that is not known.
    samples: of each split, as far as known. changed: bytes that the result's checkpoint holds. notes: what is a bound.
    """

    parameters: dict[str, float] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    samples: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    weights: int = 0
    digests: bool = False
    passes: float = 1
    sums: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def largest(self) -> Phase:
        """The phase that takes most memory."""
        return max(self.phases, key=lambda phase: phase.bytes)


def build(spec: RunSpec, module: DataModule) -> nn.Module:
    """The model of a run, without memory.

    Raises:
        UsageError: there is no such model.
    """
    config = models.for_task(spec.model, module.task_of_model) | {"pretrained": False, "checkpoint": None}
    with torch.device("meta"):
        model = models.build(**config)
        if module.objective == "denoising":
            import_module("recombine.models.diffusion_unread").without_files(model, config)
        elif module.objective != "lm":
            classes = module.num_classes if isinstance(module.num_classes, int) else CLASSES
            models.reset_head(model, classes)
    return model


def shortened(spec: RunSpec, module: DataModule, few: int | None) -> tuple[nn.Module, int | None]:
    """The model of a run, without memory and with so many of its blocks; and how many it has.

    None for that: it has all of its blocks, since they differ or are few. Models are kept, for the runs of a grid.
    """
    key = repr((spec.model, module.objective, module.num_classes, few))
    if key not in KEPT:
        model = build(spec, module)
        depth = None if few is None else shorten(model, few)
        if len(KEPT) >= 8:
            KEPT.clear()
        KEPT[key] = model, depth
    model, depth = KEPT[key]
    return copy.deepcopy(model), depth


def shorten(model: nn.Module, few: int) -> int | None:
    """Leaves a model so many of its blocks, in place. Returns how many it had; None: it stays as it is."""
    names = roles.block_names(model)
    shapes = {tuple((key, p.shape) for key, p in model.get_submodule(n).named_parameters()) for n in names}
    owners = {name.rpartition(".")[0] for name in names}
    if len(names) <= few or len(shapes) > 1 or len(owners) > 1:
        return None
    blocks = model.get_submodule(owners.pop())
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or len(blocks) != len(names):
        return None
    del blocks[few:]
    return len(names)


def attempt(model: nn.Module, method: Method, budget: Budget, losses: "Losses") -> None:
    """Applies a method to a model without memory.

    What it makes apart from the model lies on the processor, or, where a library refuses to mix both, has no memory.

    Raises:
        UsageError: as `apply` does.
    """
    for place in (nullcontext(), torch.device("meta")):
        try:
            with unchanged_on_failure(model), place:
                return rewrite.rewritten(model, method, budget, losses, Memory(2**60))
        except UsageError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
            refused = error
    raise refused


class Losses:
    """The calibration's losses. Of each pass some batches are rehearsed.

    peak: bytes that the passes took at most. seen: what the rehearsed batches cost; cost: what all cost.
    """

    def __init__(self, player: "Player", watch: Watch):
        self.player, self.watch = player, watch
        self.peak, self.seen, self.cost = 0, Cost(), Cost()

    def __call__(self) -> Iterator[Tensor]:
        player, given = self.player, self.player.settings.calibration
        module = player.module if player.spec.calibration_data is None else data.build(**player.spec.calibration_data)
        samples = min(given.samples, module.foreseen.get("train", given.samples))
        size = min(given.batch_size, samples)
        rehearsed, before = min(BATCHES, samples // size), Cost.of(self.watch)
        objective = objective_of(module)
        for _ in range(rehearsed):
            yield player.loss(objective, size, module)
        cost = Cost.of(self.watch) + before * -1.0
        self.seen, self.cost = self.seen + cost, self.cost + cost * (samples // size / rehearsed)
        self.peak, self.watch.peak = max(self.peak, self.watch.peak), self.watch.live


def attach(module: DataModule, model: nn.Module) -> None:
    """Tells the data what they need of the model, and reads nothing.

    Raises:
        UsageError: the model cannot read pictures of that size, or these data.
    """
    if isinstance(module, TokenModule):
        return
    if isinstance(module, PromptedData) and models.objective(model.recombine_source) == "denoising":
        module.image_size = model.recombine_source["image_size"]
        return
    module.attach_model(**models.for_data(model.recombine_source))
    require_image_size(model, module.image_size)


def batch(module: DataModule, model: nn.Module, size: int, learnt: bool = False):
    """A batch of that many samples without values, as `objectives` take it; texts have their largest length.

    learnt: one of a training.
    """
    if isinstance(module, PromptedData):
        return plan_drawing.batch(module, model, size, learnt)
    if not isinstance(module, TokenModule):
        pictures = torch.zeros(size, 3, module.image_size, module.image_size, device="meta")
        return pictures, torch.zeros(size, dtype=torch.long, device="meta")
    ids = torch.zeros(size, module.max_length, dtype=torch.long, device="meta")
    numbers = torch.float32 if module.objective == "regression" else torch.long
    labels = ids.clone() if module.objective == "lm" else torch.zeros(size, dtype=numbers, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def compare(player: "Player", teacher: nn.Module) -> None:
    """Both models' outputs on the samples that a retrofit compares, one by one."""
    model, samples = player.model, min(SAMPLES, player.samples.get("train", SAMPLES))
    known, apart, given = footprint.tensors(model), footprint.tensors(teacher), batch(player.module, model, 1)

    def both() -> None:
        one, other = (call(each.eval(), given) for each in (teacher, model))
        other.sub_(one).abs_().max()

    watch = footprint.forward(both, [*known, *apart], player.kernels())
    held = {"weights": footprint.size(known), "teacher": footprint.apart(apart, known), "activations": watch.peak}
    player.add("compare", Cost.of(watch) * samples, **held)


def objective_of(module: DataModule) -> Objective:
    """What the data's task is trained by."""
    if not isinstance(module.num_classes, int) and module.objective == "classification":
        return objectives.Classification(CLASSES)
    return objectives.build(module)


def head_names(model: nn.Module) -> set[str]:
    """Names of the parameters of the classification head."""
    ours = {id(p) for p in head.parameters()} if (head := roles.head(model)) is not None else set()
    return {name for name, p in model.named_parameters() if id(p) in ours}
