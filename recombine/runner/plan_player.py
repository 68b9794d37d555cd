"""A rehearsal under way: the phases of a run, one after the other, on torch's meta device."""

from math import ceil

import torch
from torch import Tensor, nn

from recombine import data
from recombine.core import footprint, memory, rewrite
from recombine.core.footprint import Kernels, Watch
from recombine.core.method import Method
from recombine.core.pair import budget_of
from recombine.core.twin import shared_copy
from recombine.data.base import DataModule
from recombine.errors import UsageError
from recombine.layers.packed import entries
from recombine.models import roles
from recombine.runner import plan_alike, plan_drawing, plan_probe, plan_stream
from recombine.runner.config import RunSpec
from recombine.runner.plan_bound import bound
from recombine.runner.plan_devices import HALF, Cost, Device
from recombine.runner.plan_packing import pack, packed_budget
from recombine.runner.plan_parts import (
    Losses,
    Phase,
    Rehearsal,
    attach,
    attempt,
    batch,
    compare,
    head_names,
    objective_of,
    shortened,
)
from recombine.training import distillation, engine, sharding
from recombine.training.objectives import Objective
from recombine.training.settings import OptimizerSettings

MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1, "adamw_8bit": 0.5, "muon": 2}  # copies of what trains, at most, in a state
LEARN: set[str] = set()  # methods with their fields, and models, that cannot be rehearsed, once that is known


class Player:
    """Plays a run on the meta device, phase by phase.

    depth: the blocks of the model, where it is rehearsed with `few` of them; None: it is with all.
    """

    def __init__(self, spec: RunSpec, device: Device, few: int | None):
        self.spec, self.device, self.told = spec, device, Rehearsal()
        self.settings, self.stage = spec.settings, spec.settings.stage
        self.budget = packed_budget(spec, self.told)
        self.module = data.build(**spec.data)
        absolute = spec.budget.kind in ("trainable", "memory", "bytes")  # is of the whole model
        self.model, self.depth = shortened(spec, self.module, None if absolute else few)
        attach(self.module, self.model)
        self.samples = self.told.samples = self.module.foreseen
        self.ranks = count if isinstance(count := self.settings.trainer.devices, int) else 1
        self.batch_size = ceil(min(self.module.batch_size, self.samples.get("train", 2**31)) / self.ranks)
        half = {"bf16-mixed": HALF, "16-mixed": torch.float16, "auto": HALF if device.gpu else None}
        self.kernels = lambda: Kernels(half.get(self.settings.trainer.precision), device.gpu)
        self.scored: tuple[Watch, Cost] | None = None  # a batch of the test, where the validation has told
        self.maps, self.mapped = False, 0  # weights are pages of their file; bytes that are replaced and stay mapped
        self.sharded = sharding.asked(self.settings.trainer.strategy)

    def play(self) -> Rehearsal:
        """All phases."""
        name, first = self.stage.name, self.spec.compressor or self.spec.method
        self.told.notes += ["base=: the pretrained model is planned in its place"] * (self.spec.base is not None)
        self.told.weights = footprint.size(self.model.parameters())
        self.load()
        plan_drawing.prior(self)
        if name in ("evaluate", "sample"):
            self.model.requires_grad_(False)
            pack(self.model, self.budget)
            self.score()
            return self.count()
        plan_probe.probe(self)
        teacher = shared_copy(self.model) if name in ("compress", "joint", "retrofit") else None
        self.change(first, teacher)
        if name == "retrofit":
            pack(self.model, self.budget)
            compare(self, teacher)
        if name in ("compress", "joint") and self.stage.distil.epochs:
            self.distil(first, teacher)
        if name == "compress":
            rewrite.train_only(self.model, head_names(self.model))
        elif self.spec.compressor is not None:
            self.change(self.spec.method, None)
        if name == "joint":
            rewrite.train_only(self.model, set(self.model.recombined.trainable))
        pack(self.model, self.budget)
        if name == "profile" and (turns := 2 * getattr(self.stage, "rounds", 0)) and footprint.trained(self.model):
            self.train("time", objective_of(self.module), self.settings.optim, 1, None, turns)  # beside a reference
        if name in ("adapt", "compress", "joint"):
            if footprint.trained(self.model):
                self.train("train", objective_of(self.module), self.settings.optim, self.settings.trainer.epochs, None)
            self.score()
        return self.count()

    def count(self) -> Rehearsal:
        """The parameters, as the last phase left the model."""
        model = self.model
        total, trains = sum(entries(model).values()), footprint.trained(model)
        untouched = getattr(getattr(model, "recombined", None), "untouched", set())
        self.told.changed = footprint.size(p for n, p in model.named_parameters() if n not in untouched)
        self.told.parameters = {"total": total, "trained": sum(p.numel() for p in trains)}
        return self.told

    def add(self, name: str, cost: Cost | None, **held: int) -> None:
        """Adds a phase, of which one rank holds these bytes. In shards it trains beside a whole copy of the weights."""
        held["frozen parts"] = plan_drawing.frozen(self.model)
        held["mapped file"] = 0 if held.get("teacher") else self.mapped  # which it reads
        if self.sharded and "gradients" in held:
            held |= {part: held[part] / self.ranks for part in ("gradients", "optimizer")}
            held["weights"] += held["weights"] / self.ranks
        self.told.phases.append(Phase(name, {k: int(v) for k, v in held.items() if v}, cost))

    def load(self) -> None:
        """The weights, and the file they come from; a GPU's are read beside it, in the processor's memory."""
        weights = footprint.size(footprint.tensors(self.model))
        read = self.spec.model.get("pretrained", True) and not self.device.gpu
        self.maps = read and self.spec.model.get("library") == "transformers"
        self.add("load", Cost(moved=2 * weights), weights=weights, file=weights if read and not self.maps else 0)

    def change(self, method: Method, teacher: nn.Module | None) -> None:
        """Calibrates and rewrites."""
        pair, model, first = self.spec.compressor is not None, self.model, method is not self.spec.method
        plan_stream.foresee(self, method)
        if pair and not hasattr(model, "recombined"):
            roles.split_fused(model, self.spec.method.targets)
        budget = budget_of(method, model, self.budget, self.spec.compressor, self.spec.method)
        method, sites, mapped = method.copy(), rewrite.find_sites(model, method), self.mapped
        known, others = footprint.tensors(model), [] if teacher is None else footprint.tensors(teacher)
        kinds = method.statistics_needed()
        held = {"weights": footprint.size(known), "teacher": footprint.apart(others, known)}
        held["statistics"] = memory.sums(sites, kinds) if kinds else 0
        self.told.digests |= type(method).digest is not Method.digest
        watch, learns = Watch(known), repr((plan_alike.fields_of(method), self.spec.model))
        losses = Losses(self, watch)
        try:
            if learns in LEARN:
                raise footprint.Endless
            with watch, self.kernels():
                attempt(model, method, budget, losses)
                if pair and first:
                    rewrite.finish(model, method, alone=False)
            method.kept.close(True)
            model.to("meta")  # what was made apart from it
        except UsageError:
            raise
        except Exception:  # it reads values, of which there are none
            LEARN.add(learns)
            losses.peak = 0
            bound(self, method, sites)
            watch.peak = held["weights"] + 8 * 2 * sum(site.module.weight.numel() for site in sites)
        if losses.peak:
            there = losses.peak - held["weights"] - held["statistics"]
            self.add("calibrate", losses.cost, **held, activations=max(0, there))
        new = footprint.apart(footprint.tensors(model), known)
        rest = max(0, watch.peak - held["weights"] - new)
        held |= {"statistics": min(rest, held["statistics"]), "new weights": new}
        self.add("rewrite", Cost.of(watch) + losses.seen * -1.0, **held, factors=rest - held["statistics"])
        if self.maps:
            self.mapped = mapped + footprint.apart(known, footprint.tensors(model))

    def distil(self, method: Method, teacher: nn.Module) -> None:
        """The training that follows the original model."""
        distil = self.stage.distil
        rewrite.train_only(self.model, method.distillation_parameters(self.model))
        objective = distillation.Distillation(teacher, distil.kl, distil.mse, distil.features, distil.l1)
        self.train("distil", objective, distil, distil.epochs, teacher)
        if self.model.recombined.steps:
            rewrite.finish(self.model, method, alone=self.spec.compressor is None)

    def train(
        self,
        name: str,
        objective: Objective,
        optim: OptimizerSettings,
        epochs: int,
        teacher: nn.Module | None,
        turns: int | None = None,
    ) -> None:
        """A training: its steps, and what validates it. turns: of a profile, so many steps and forwards instead."""
        self.model.train()
        apart = footprint.tensors(teacher) if teacher is not None else []
        with engine.recomputed(self.model, self.settings.trainer.gradient_checkpointing):
            watch = footprint.step(self.model, lambda: self.loss(objective, self.batch_size), self.kernels(), apart)
        trains, moments = footprint.size(footprint.trained(self.model)), MOMENTS[optim.name]
        cost = None
        if turns:
            cost = (Cost.of(watch) + self.forward(self.batch_size)[1] * self.batch_size) * turns
        elif train := self.samples.get("train"):
            steps = ceil(train / (self.batch_size * self.ranks)) * epochs
            cost = (Cost.of(watch) + Cost(moved=(3 + 2 * moments) * trains)) * steps
            if val := self.samples.get("val"):
                scored = self.forward(self.batch_size, objective)
                cost += scored[1] * (val * epochs / self.ranks)
                self.scored = None if teacher else scored
        held = {"weights": footprint.size(footprint.tensors(self.model)), "gradients": trains}
        held |= {"optimizer": moments * trains, "activations": max(0, watch.peak - trains)}
        held |= {"teacher": footprint.apart(apart, footprint.tensors(self.model))}
        if not self.device.gpu:
            held |= {"best weights": trains * (epochs > 1), "reference": self.told.weights * bool(turns)}
        self.add(name, cost, **held)

    def score(self) -> None:
        """The test, and what a model that draws is asked for in it."""
        plan_drawing.test(self)
        if self.stage.name == "sample":
            return
        (watch, each), test = self.scored or self.forward(self.batch_size), self.samples.get("test")
        weights = footprint.size(footprint.tensors(self.model))
        self.add("test", each * test if test else None, weights=weights, activations=watch.peak)

    def forward(self, size: int, objective: Objective | None = None) -> tuple[Watch, Cost]:
        """What scoring a batch of that size takes, and what it costs a sample."""
        objective = objective or objective_of(self.module)
        self.model.eval()
        known = footprint.tensors(self.model)
        known += footprint.tensors(objective.teacher) if hasattr(objective, "teacher") else []
        watch = footprint.forward(lambda: self.loss(objective, size, learnt=False), known, self.kernels())
        self.model.train()
        return watch, Cost.of(watch) * (1 / size)

    def loss(self, objective: Objective, size: int, module: DataModule | None = None, learnt: bool = True) -> Tensor:
        """The loss of a batch without values. learnt: one of the training rows."""
        return objective.loss(self.model, batch(module or self.module, self.model, size, learnt))[0]
