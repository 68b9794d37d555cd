"""Rewrite the model and compare it with the original: weights layer by layer, outputs on training samples."""

import copy

import torch

from recombine import layers, methods
from recombine.core.budget import Budget
from recombine.layers.quantize import quantise
from recombine.methods import Method, apply
from recombine.models import roles
from recombine.result_schema import StagePart
from recombine.stages.context import Run
from recombine.training import objectives
from recombine.training.lit import LitRecombine


def compressor(run: Run) -> Method:
    """The method that compresses: the run's compressor, or else its method."""
    return run.compressor or run.method


def rewrite(run: Run, method: Method) -> None:
    """Applies the method, timed; under the run's budget where it is this method's to keep."""
    pair = run.compressor is not None
    mine = not pair or (method is run.method) == (run.budget.kind == "trainable")
    if pair:
        prepare_pair(run)
    with run.timed("retrofit"):
        apply(run.model, method, run.budget if mine else Budget(), run.losses)


def rewrite_all(run: Run) -> None:
    """The compressor, where there is one, then the method on what it left."""
    if run.compressor is not None:
        rewrite(run, run.compressor)
        methods.finish(run.model, run.compressor, alone=False)
    rewrite(run, run.method)


def prepare_pair(run: Run) -> None:
    """Splits a fused qkv before the compressor sees it, where the method that comes next wants q, k or v."""
    if not hasattr(run.model, "recombined"):
        roles.find(run.model, run.method.targets, torch.nn.Module)


@torch.no_grad()
def retrofit(run: Run) -> StagePart:
    original = copy.deepcopy(run.model).eval()
    with torch.enable_grad():
        rewrite_all(run)
    if run.cfg.stage.bits is not None:
        quantise(map(run.model.get_submodule, run.model.recombined.targets), run.cfg.stage.bits)
    run.model.eval()
    batch = run.fetch(run.data.train, list(range(min(32, len(run.data.train)))))
    reference, logits = objectives.call(original, batch), objectives.call(run.model, batch)
    scores = {}
    if run.cfg.stage.test:
        from recombine.stages.adapt import test  # which needs this module

        scores = {"test": test(run, LitRecombine(run.model, run.method, run.task()))}
    return scores | {
        "weight_error": weight_errors(original, run.model),
        "logit_error": (logits - reference).abs().max().item(),
        "logit_scale": reference.abs().max().item(),
    }


def weight_errors(original: torch.nn.Module, model: torch.nn.Module) -> dict[str, float]:
    """|W - W'| / |W| (Frobenius) of every recombined layer that kept its place and its shape."""
    if model.recombined.blocks is not None:
        return {}
    roles.find(original, tuple(model.recombined.targets.values()), torch.nn.Module)  # splits a fused qkv as the model's
    errors = {}
    for name in model.recombined.targets:
        layer, before = model.get_submodule(name), original.get_submodule(name).weight
        if isinstance(layer, layers.RecombinedLinear) and (layer.out_features, layer.in_features) == before.shape:
            dense = before.double()
            errors[name] = ((layer.dense_weight().double() - dense).norm() / dense.norm()).item()
    return errors
