"""quantize.bits=auto: which bits, and with them which ranks, come closest to the model under a budget of bytes.

Each of none, 8 and 4 bits is tried: the compressor gets the largest size that fits the bytes at these bits, is applied,
packed and measured, and the model is put back. Where the compressor can choose ranks layer by layer, a mix is tried
too: rank and bits of every layer together (methods/svd/mixing.py). The error is that of the outputs on calibration
batches, |y - y0|^2 / |y0|^2 against the original model. It needs no labels and no fitted head. A distillation comes
later.
"""

import json
import logging
import math
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from recombine.core.budget import Budget
from recombine.core.packing import MIX, Packing
from recombine.core.rollback import unchanged
from recombine.core.twin import sharing
from recombine.data.batch_sampler import seed_of
from recombine.errors import UsageError
from recombine.layers.packed import BITS
from recombine.runtime.atomic import atomic_write
from recombine.stages.context import RunContext
from recombine.stages.settings import QuantizeSettings, StageSettings
from recombine.training import distributed, objectives

log = logging.getLogger(__name__)

BATCHES = 4  # of the calibration, whose outputs are compared
NONE = "none"  # no bits: the weights stay in float


def require(quantize: QuantizeSettings, stage: StageSettings, budget: Budget, base: object) -> None:
    """Refuses bits beside what they cannot stand beside.

    Raises:
        UsageError: names both, and the way out.
    """
    bits = quantize.bits
    if bits is None:
        return
    if bits == "auto" and budget.kind != "bytes":
        why = "chooses the bits that come closest to the model under a budget of bytes"
        raise UsageError(f"quantize.bits=auto: {why}; say budget=bytes_25 too, or 8, or 4")
    if base is not None:
        why = f"base={base} stays as it is, for all of its adapters"
        raise UsageError(f"quantize.bits={bits}: {why}; say it in the run that makes the base")
    if (rounded := getattr(stage, "bits", None)) is not None:
        raise UsageError(f"quantize.bits={bits} and stage.bits={rounded} both round the weights: drop one of them")


def settle(run: RunContext) -> None:
    """Gives the run's budget the packing that `quantize` asks for; auto is chosen here, once for all processes.

    Raises:
        UsageError: no choice meets the budget.
    """
    if (bits := run.settings.quantize.bits) is None:
        return
    if bits == "auto":
        path = run.state / "mix.json"
        if distributed.rank() == 0 and not path.is_file():
            with run.timed("mix"):
                found = errors(run)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(found))
        distributed.wait()
        run.choices = json.loads(path.read_text())
        best = min(run.choices, key=lambda word: math.inf if run.choices[word] is None else run.choices[word])
        bits = {NONE: None, MIX: MIX}[best] if best in (NONE, MIX) else int(best)
        use(run, bits)
    run.budget = replace(run.budget, packing=packing(run, bits))


def use(run: RunContext, bits: int | str | None) -> None:
    """Under a mix, has the method that compresses choose the bits of its layers too."""
    if bits == MIX:
        first = run.first_method
        setattr(run, "method" if run.compressor is None else "compressor", first.copy(**first.mixes))


def packing(run: Any, bits: int | str | None) -> Packing | None:
    """How a run packs its weights. What the first method trains is frozen where others follow.

    Args:
        run: with its `compressor` and `settings`, as a RunContext or a RunSpec has them.
    """
    if bits is None:
        return None
    trains = run.compressor is None and run.settings.stage.name != "compress" and not adapts_first(run)
    return Packing(bits, run.settings.quantize.group, trains)


def adapts_first(run: Any) -> bool:
    """Whether the adapter comes first, and is merged before the compressor. run: as in `packing`."""
    return getattr(run.settings.stage, "order", None) == "adapt_first"


def errors(run: RunContext) -> dict[str, float | None]:
    """The error of every choice, by its word; None: it cannot meet the budget.

    Raises:
        UsageError: none can.
    """
    found: dict[str, float | None] = {}
    refused, budget, pair, seconds = None, run.budget, (run.method, run.compressor), dict(run.seconds)
    if adapts_first(run):
        run.method, run.compressor = run.first_method, None
    first = (run.method, run.compressor)
    mixed = (MIX,) if run.first_method.mixes else ()
    for bits in (None, *mixed, *BITS):
        word = NONE if bits is None else str(bits)
        run.budget, (run.method, run.compressor) = replace(budget, packing=packing(run, bits)), first
        try:
            use(run, bits)
            found[word] = error(run)
        except UsageError as reason:
            found[word], refused = None, reason
            log.warning("note: quantize.bits=auto: %s bits are no choice: %s", word, reason)
    run.budget, (run.method, run.compressor) = budget, pair
    run.seconds.clear()
    run.seconds.update(seconds)  # those of the trials are of the choice alone
    if refused is not None and not any(value is not None for value in found.values()):
        raise refused
    return found


def error(run: RunContext) -> float:
    """|y - y0|^2 / |y0|^2 of the outputs, of the model rewritten and packed under the run's budget; it is put back."""
    original = sharing(run.model).eval()
    torch.manual_seed(seed_of(run.settings.seed, "rewritten"))  # as the run itself will
    lost = total = 0.0
    with unchanged(run.model):
        run.rewrite(run.first_method)
        if run.budget.packing is not None:
            if not run.budget.packing.trains:
                run.model.requires_grad_(False)
            run.quantize()
        run.model.eval()
        with torch.no_grad():
            for batch in islice(run.calibration_batches(), BATCHES):
                before, after = (objectives.call(model, batch).double() for model in (original, run.model))
                lost, total = lost + (after - before).square().sum().item(), total + before.square().sum().item()
    return lost / total
