"""Rewrite the model and compare it with the original: weights layer by layer, outputs on training samples."""

import copy

import torch

from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.layers.quantize import quantize
from recombine.models.roles import layer_at
from recombine.result_schema import StagePart
from recombine.stages.adapt import test
from recombine.stages.context import RunContext
from recombine.training import finite, objectives
from recombine.training.lit import LitRecombine


@torch.no_grad()
def retrofit(run: RunContext) -> StagePart:
    """Rewrites and compares: weight_error of each layer, and the largest logit_error beside logit_scale.

    With stage.test, the rewritten model is scored on the test set too.
    """
    stage, original = run.settings.stage, copy.deepcopy(run.model).eval()
    with torch.enable_grad():
        run.rewrite_all()
    if stage.bits is not None:
        quantize(map(run.model.get_submodule, run.model.recombined.targets), stage.bits)
    run.model.eval()
    batch = run.batch(run.data.train, list(range(min(32, len(run.data.train)))))
    reference, logits = objectives.call(original, batch), objectives.call(run.model, batch)
    if not (reference.isfinite().all() and logits.isfinite().all()):
        raise UsageError(f"the outputs on training samples are not finite: {finite.blame(run.model, batch)}")
    scores = {"test": test(run, LitRecombine(run.model, run.method, run.objective()))} if stage.test else {}
    return scores | {
        "weight_error": weight_errors(original, run.model),
        "logit_error": (logits - reference).abs().max().item(),
        "logit_scale": reference.abs().max().item(),
    }


def weight_errors(original: torch.nn.Module, model: torch.nn.Module) -> dict[str, float]:
    """|W - W'| / |W| (Frobenius) of every recombined layer that kept its place and its shape, by name."""
    if model.recombined.blocks is not None:
        return {}
    errors = {}
    for name in model.recombined.targets:
        layer, before = model.get_submodule(name), layer_at(original, name).weight
        if isinstance(layer, RecombinedLinear) and (layer.out_features, layer.in_features) == before.shape:
            dense = before.double()
            errors[name] = ((layer.dense_weight().double() - dense).norm() / dense.norm()).item()
    return errors
