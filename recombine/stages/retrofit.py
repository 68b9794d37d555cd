"""Rewrite the model and compare it with the original: weights layer by layer, outputs on training samples."""

import torch
from torch import Tensor, nn

from recombine.core.twin import shared_copy
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.layers.quantize import quantize
from recombine.models.roles import layer_at
from recombine.result_schema import StagePart
from recombine.runtime.mapped import release
from recombine.stages.adapt import test
from recombine.stages.context import RunContext
from recombine.training import finite, objectives
from recombine.training.lit import LitRecombine

SAMPLES = 8  # of the training set, whose outputs are compared
ROWS = 1024  # of a weight, which are compared at once in float64


@torch.no_grad()
def retrofit(run: RunContext) -> StagePart:
    """Rewrites and compares: weight_error of each layer, and the largest logit_error beside logit_scale.

    With stage.test, the rewritten model is scored on the test set too. The comparison's time is `seconds.compare`.
    """
    stage, original = run.settings.stage, shared_copy(run.model)
    batches = [run.batch(run.data.train, [i]) for i in range(min(SAMPLES, len(run.data.train)))]
    with torch.enable_grad():
        run.rewrite_all()
    if stage.bits is not None:
        quantize(map(run.model.get_submodule, run.model.recombined.targets), stage.bits)
    largest = scale = 0.0
    with run.timed("compare"):
        for batch in batches:  # one by one: a vocabulary is wide
            before, logits = (objectives.call(model.eval(), batch) for model in (original, run.model))
            if not (before.isfinite().all() and logits.isfinite().all()):
                raise UsageError(f"the outputs on training samples are not finite: {finite.blame(run.model, batch)}")
            scale = max(scale, before.abs().max().item())
            largest = max(largest, logits.sub_(before).abs_().max().item())
        errors = weight_errors(original, run.model)
    scores = test(run, LitRecombine(run.model, run.method, run.objective())) if stage.test else {}
    return scores | {
        "weight_error": errors,
        "logit_error": largest,
        "logit_scale": scale,
    }


def weight_errors(original: nn.Module, model: nn.Module) -> dict[str, float]:
    """|W - W'| / |W| (Frobenius) of every recombined layer that kept its place and its shape, by name."""
    if model.recombined.blocks is not None:
        return {}
    errors = {}
    for name in model.recombined.targets:
        layer, before = model.get_submodule(name), layer_at(original, name).weight
        if isinstance(layer, RecombinedLinear) and (layer.out_features, layer.in_features) == before.shape:
            errors[name] = relative_error(layer.dense_weight(), before)
        release([before])
    return errors


def relative_error(weight: Tensor, before: Tensor) -> float:
    """|weight - before| / |before| (Frobenius), summed in float64 without a copy of either."""
    lost = total = 0.0
    for new, old in zip(weight.detach().split(ROWS), before.detach().split(ROWS), strict=True):
        old = old.double()
        lost, total = lost + (new.double() - old).square().sum(), total + old.square().sum()
    return (lost / total).sqrt().item()
