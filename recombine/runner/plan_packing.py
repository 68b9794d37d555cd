"""Packed weights in a plan."""

from dataclasses import replace

from torch import nn

from recombine.core.budget import Budget
from recombine.core.quantizing import quantize
from recombine.layers.packed import packed_in
from recombine.runner.config import RunSpec
from recombine.runner.plan_parts import Rehearsal
from recombine.stages import mix


def packed_budget(spec: RunSpec, told: Rehearsal) -> Budget:
    """The run's budget with the packing that it asks for; what is chosen in the run is planned with 8 bits."""
    if (bits := spec.settings.quantize.bits) == "auto":
        told.notes.append("quantize.bits=auto: planned with 8 bits, the run chooses")
        bits = 8
    return replace(spec.budget, packing=mix.packing(spec, bits))


def pack(model: nn.Module, budget: Budget) -> None:
    """Packs what is frozen of a model without memory, once."""
    if budget.packing is not None and not packed_in(model):
        quantize(model, budget.packing.bits, budget.packing.group)
