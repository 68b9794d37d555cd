"""Compress under a budget, distil from the original model (CRISP Alg. 4), then train.

`compress` trains the classifier alone. `joint` trains what the method trains as well.
"""

import copy

from torch import nn

from recombine.core.rewrite import finish, train_only
from recombine.errors import UsageError
from recombine.models import roles
from recombine.result_schema import StagePart
from recombine.stages.adapt import fit, train_and_test
from recombine.stages.context import RunContext
from recombine.stages.retrofit import weight_errors
from recombine.training.objectives import Distillation


def compress(run: RunContext) -> StagePart:
    """Compress and distil, then train the classifier only."""
    part, _ = distil(run)
    head = [] if (classifier := roles.head(run.model)) is None else list(classifier.parameters())
    train_only(run.model, {name for name, p in run.model.named_parameters() if any(p is q for q in head)})
    return part | train_and_test(run)


def joint(run: RunContext) -> StagePart:
    """Compress and distil, then adapt."""
    part, original = distil(run)
    if run.compressor is not None:
        run.checkpointed_step("adapted", lambda: run.rewrite(run.method), base=original)
    train_only(run.model, run.model.recombined.trainable)
    return part | train_and_test(run)


def distil(run: RunContext) -> tuple[StagePart, nn.Module]:
    """Rewrites the model and trains it to follow the original on the training data, without labels.

    Returns:
        Its part of the result, and the original model.

    Raises:
        UsageError: the method does not compress.
    """
    method, settings = run.first_method, run.settings.stage.distil
    if not method.compresses:
        raise UsageError(
            f"stage={run.settings.stage.name}: {run.labels['method']} does not compress; use svd or crisp, "
            "or put a compressor before it: method@compressor=svd"
        )
    teacher = copy.deepcopy(run.model)
    run.checkpointed_step("rewritten", lambda: run.rewrite(method))
    part = {"weight_error": weight_errors(teacher, run.model)}
    if settings.epochs:
        train_only(run.model, method.distillation_parameters(run.model))
        objective = Distillation(teacher, settings.kl, settings.mse, settings.features, settings.l1)
        _, best = fit(run, objective, settings, settings.epochs, "distilled", method)
        part["distil"] = {
            "val_loss": None if run.data.val is None else best.value,
            "best_epoch": best.epoch,
            "curves": run.curves["distilled"],
        }
    method.on_distillation_step(run.model, 1.0)
    finish(run.model, method, alone=run.compressor is None)
    return part, teacher
