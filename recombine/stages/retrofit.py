"""Rewrite the model and compare it with the original: weights layer by layer, logits on validation images."""

import copy

import torch

from recombine import layers
from recombine.methods import apply
from recombine.models import roles
from recombine.stages.run import Run


def rewrite(run: Run) -> None:
    """Applies the run's method under its budget, timed."""
    with run.timed("retrofit"):
        apply(run.model, run.method, run.budget)


@torch.no_grad()
def retrofit(run: Run) -> dict:
    original = copy.deepcopy(run.model).eval()
    rewrite(run)
    run.model.eval()
    images, _ = run.data.val.__getitems__(list(range(min(32, len(run.data.val)))))
    images = run.data.normalise(images.to(next(run.model.parameters()).device))
    reference, logits = original(images), run.model(images)
    return {
        "weight_error": weight_errors(original, run.model),
        "logit_error": (logits - reference).abs().max().item(),
        "logit_scale": reference.abs().max().item(),
    }


def weight_errors(original: torch.nn.Module, model: torch.nn.Module) -> dict[str, float]:
    """|W - W'| / |W| (Frobenius) of every recombined layer."""
    roles.find(original, tuple(model.recombined.targets.values()))  # splits a fused qkv where the model's was split
    errors = {}
    for name in model.recombined.targets:
        layer = model.get_submodule(name)
        if isinstance(layer, layers.RecombinedLinear):
            dense = original.get_submodule(name).weight.double()
            errors[name] = ((layer.dense_weight().double() - dense).norm() / dense.norm()).item()
    return errors
