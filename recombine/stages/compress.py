"""Compress under a budget, distil from the original model (CRISP Alg. 4), then train.

`compress` trains the classifier alone. `joint` trains what the method trains as well.
"""

import copy

from torch import nn

from recombine.core.account import count
from recombine.core.budget import Budget
from recombine.core.checkpoint.merging import merge
from recombine.core.method import Method
from recombine.core.rewrite import find_sites, finish, train_only
from recombine.core.twin import sharing, unshare
from recombine.errors import UsageError
from recombine.models import roles
from recombine.result_schema import StagePart
from recombine.stages.adapt import fit, train_and_test
from recombine.stages.context import RunContext
from recombine.stages.retrofit import weight_errors
from recombine.stages.settings import StageSettings
from recombine.training.distillation import Distillation


def compress(run: RunContext) -> StagePart:
    """Compress and distil, then train the classifier only."""
    part, _ = distil(run)
    head = [] if (classifier := roles.head(run.model)) is None else list(classifier.parameters())
    train_only(run.model, {name for name, p in run.model.named_parameters() if any(p is q for q in head)})
    run.quantize()
    return part | train_and_test(run)


def joint(run: RunContext) -> StagePart:
    """Compress and distil, then adapt; or the other way round."""
    if run.settings.stage.order == "adapt_first":
        return adapted_first(run)
    part, original = distil(run)
    if run.compressor is not None:
        run.checkpointed_step("adapted", lambda: run.rewrite(run.method), base=original)
    train_only(run.model, run.model.recombined.trainable)
    run.quantize()
    return part | train_and_test(run)


def adapted_first(run: RunContext) -> StagePart:
    """Adapt and merge, then compress and distil from the adapted model, with its head as it is.

    Raises:
        UsageError: what comes out cannot be kept.
    """
    if getattr(run.model, "needs_folder", False):
        why = "all of the model is kept then, and this one draws with parts that lie in its folder"
        raise UsageError(f"stage.order=adapt_first: {why}; leave it out")
    run.checkpointed_step("adapted", lambda: run.rewrite(run.method))
    objective = run.objective(run.settings.optim.label_smoothing)
    _, best = fit(run, objective, run.settings.optim, run.settings.trainer.epochs, "best", run.method)
    run.merged = run.model.recombined.steps[-1]
    merge(run.model)
    part, _ = distil(run)
    train_only(run.model, set())
    run.quantize()
    return part | {"best_epoch": best.epoch} | train_and_test(run, whole=True)


def distil(run: RunContext) -> tuple[StagePart, nn.Module]:
    """Rewrites the model and trains it to follow the original on the training data, without labels.

    Returns:
        Its part of the result, and the original model.
    """
    method, settings = run.first_method, run.settings.stage.distil
    one = run.settings.trainer.strategy == "auto"  # others may shard, and no parameter can be in two shards
    teacher = sharing(run.model) if one else copy.deepcopy(run.model)
    run.checkpointed_step("rewritten", lambda: run.rewrite(method))
    part = {"weight_error": weight_errors(teacher, run.model)}
    if settings.epochs:
        plain = type(method).retained_weights is Method.retained_weights  # others fold some away afterwards
        if plain and run.budget.packing is None:  # bits compress too
            require_compression(count(run.model).retained, method.label, run.settings.stage.name)
        train_only(run.model, method.distillation_parameters(run.model))
        unshare(teacher, run.model)
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


def require_compressor(stage: StageSettings, method: Method, compressor: Method | None, label: str) -> None:
    """Refuses a stage whose first method does not compress, and one without the distillation that a method needs.

    Args:
        label: what the method is called.

    Raises:
        UsageError: names the way out.
    """
    for part in filter(None, (compressor, method)) if stage.name == "adapt" else ():
        if type(part).on_distillation_step is not Method.on_distillation_step:
            fix = "set stage=joint or stage=compress"
            raise UsageError(f"stage=adapt: {part.label} takes its form in a distillation; {fix}")
    if stage.name not in ("compress", "joint"):
        return
    if compressor is None and getattr(stage, "order", None) == "adapt_first":
        raise UsageError("stage.order=adapt_first: nothing compresses after the method; add method@compressor=svd_llm")
    if not (compressor or method).compresses:
        fix = "use svd or crisp, or put a compressor before it: method@compressor=svd"
        raise UsageError(f"stage={stage.name}: {label} does not compress; {fix}")


def require_small_fields(model: nn.Module, method: Method, budget: Budget, stage: str) -> None:
    """Refuses a method that by its own fields, without a budget, holds more than the dense layers; nothing is built.

    Only a size in closed form is known so early. One that comes from data or spectra is looked at when it is known.

    Raises:
        UsageError: as `require_compression` says.
    """
    method, sites = method.copy(), find_sites(model, method)
    energy = getattr(method, method.budget_fields.get("energy", ""), None)
    if budget.kind != "none" or not method.compresses or method.statistics_needed() or energy is not None:
        return
    try:
        method.before_budget(model, sites, None)
    except UsageError:  # it learns from data first, or cannot be: the run says so where it happens
        return
    share = method.retained_weights(sites) / sum(site.module.weight.numel() for site in sites)
    require_compression(share, method.label, stage)


def require_compression(share: float, label: str, stage: str) -> None:
    """Refuses to distil a model that is no smaller.

    Args:
        share: what the method, called `label`, leaves of the dense target layers' weights.

    Raises:
        UsageError: names the share and the ways out.
    """
    if share > 1:
        what = f"{label} with these fields holds {100 * share:.4g} % of the target layers' weights"
        raise UsageError(f"stage={stage}: {what}, which compresses nothing; say budget=retained_50, or stage=adapt")
