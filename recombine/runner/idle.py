"""Keys that have no effect beside the others of a run: a budget sets the field, the data have no classes, ..."""

from recombine.core.budget import Budget
from recombine.core.method import Method
from recombine.data.base import DataModule
from recombine.runner.config import RunSpec

SIZE = ("retained", "memory", "energy")  # kinds of budget that limit what a method stores


def idle(spec: RunSpec, data: DataModule) -> set[str]:
    """The full names of the keys that this run does not read, though its stage does.

    Args:
        data: what the run trains on, set up.
    """
    limits_method = spec.compressor is None or spec.budget.kind == "trainable"
    keys = overruled(spec.method, spec.budget if limits_method else Budget())
    if spec.compressor is not None:
        keys |= overruled(spec.compressor, Budget() if limits_method else spec.budget)
    keys |= {f"{key}.lr" for key, rates in rates_beside(spec).items() if rates and None not in rates}
    distil = getattr(spec.settings.stage, "distil", None)
    if distil is not None and not distil.epochs:
        keys |= {f"stage.distil.{name}" for name in vars(distil) if name != "epochs"}
    if data.objective != "lm":
        keys.add("harness")
    if data.objective != "denoising":
        keys.add("sample")
    elif distil is not None:
        keys.add("stage.distil.kl")
    if data.num_classes is None:
        keys |= {"probe", "optim.head"}
    if data.objective != "classification":
        keys.add("optim.label_smoothing")
    return keys


def rates_beside(spec: RunSpec) -> dict[str, list[float | None]]:
    """By the node of each method the rates of the trainings of its weights. One that is not None replaces its own."""
    stage, first = spec.settings.stage, spec.compressor or spec.method
    found: dict[str, list[float | None]] = {first.key: [], spec.method.key: []}
    if stage.name in ("adapt", "joint"):
        found[spec.method.key].append(spec.settings.optim.lr)
    if stage.name in ("compress", "joint") and stage.distil.epochs:
        found[first.key].append(stage.distil.lr)
    return found


def overruled(method: Method, budget: Budget) -> set[str]:
    """The fields of a method that set its size, where another field or the budget does."""
    if budget.kind != "none":
        return {f"{method.key}.{budget.field(method)}"}
    given = any(getattr(method, name) is not None for name in method.conflicting_fields)
    sizes = {method.budget_fields[kind] for kind in SIZE if kind in method.budget_fields}
    return {f"{method.key}.{name}" for name in sizes - {*method.conflicting_fields}} if given else set()
