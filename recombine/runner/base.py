"""`base=`: the compressed checkpoint that a run of stage=adapt starts from, in the place of the pretrained model."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from recombine import models
from recombine.core import checkpoint
from recombine.core.budget import Budget
from recombine.core.checkpoint import metadata
from recombine.core.method import Method, method_classes
from recombine.core.rewrite import Step, find_sites
from recombine.errors import AlreadyRewritten, UsageError
from recombine.models import roles
from recombine.runner.labels import label_of
from recombine.runtime import conf, tensor_file
from recombine.runtime.kinds import shown

BEST = "best.safetensors"  # of a run's folder
MAY_DIFFER = ("name", "tag", "pretrained", "checkpoint", "num_classes", "drop_path", "attn_drop", "dtype")


def base_file(value: str | Path | None, stage: str, compressor: str | None, model: Mapping[str, Any]) -> Path | None:
    """The file that `base` means.

    Args:
        compressor: the word after method@compressor=; None: there is none.
        model: the arguments of `models.build`.

    Raises:
        UsageError: there is no such file, it is of another model, or the run cannot start from one.
    """
    if value is None:
        return None
    if stage != "adapt":
        raise UsageError(f"base={value}: stage={stage} starts from the pretrained model; say stage=adapt, or drop it")
    if compressor is not None:
        raise UsageError(f"method@compressor={compressor}: base={value} is compressed already; drop one of the two")
    path = Path(str(value)).expanduser()
    if path.is_dir():
        if (path / BEST).is_file() and not (path / "result.json").is_file():
            fix = f"start it again, or name its file, {path / BEST}"
            raise UsageError(f"base={value}: that run has not finished, so its {BEST} may still change; {fix}")
        path /= BEST
    if not path.is_file():
        fix = "say the folder of a finished run, or the file of a checkpoint"
        raise UsageError(f"base={value}: there is no file {path}; {fix}")
    require_same_model(path, model)
    return path


def require_same_model(path: Path, model: Mapping[str, Any]) -> None:
    """Refuses a base of another architecture, before a model is built.

    Args:
        model: the arguments of `models.build`.

    Raises:
        UsageError: it is one, or the file is no checkpoint, or a user's own model has no word after model=.
    """
    try:
        source = metadata.validated(path, tensor_file.read(path, verify=False)[0])["source"]
    except UsageError as error:
        raise UsageError(f"base={error}") from error
    if source is None:
        raise UsageError(f"base={path}: made from a model of your own; use recombine.load and recombine.save_adapter")
    here = models.check(**model)
    if (there := source["arch"], source.get("library", "timm")) != (here["arch"], model.get("library", "timm")):
        raise UsageError(
            f"base={path}: was made from model={source['name']} ({there}), not from model={here['name']}; say that one"
        )


def put_on_base(path: Path, model: nn.Module, method: Method, budget: Budget) -> tuple[Method, bool]:
    """Makes the pretrained model, in place, the one that a base's file holds.

    Returns:
        The method that adapts, and whether it is the one that made the base, whose factors it trains then.

    Raises:
        UsageError: the file does not fit, holds an adapted model, or the method cannot follow.
    """
    wanted = dict(model.recombine_source)
    try:
        source = metadata.validated(path, tensor_file.read(path, verify=False)[0])["source"]
        for key in source.keys() & wanted.keys() - {*MAY_DIFFER}:
            if source[key] != wanted[key]:
                there, here = shown(source[key]), shown(wanted[key])
                raise UsageError(f"{path}: was made with model.{key}={there}, not {here}; say model.{key}={there}")
        checkpoint.load(path, model)
    except UsageError as error:
        raise UsageError(f"base={error}") from error
    model.recombine_source = wanted
    steps = model.recombined.steps
    for step in steps:
        if not method_classes()[step.method].compresses:
            word = label_of(step.method, step.fields)
            raise UsageError(f"base={path}: is adapted by {word} already; give the compressed one that it came from")
    if type(method).__name__ == steps[-1].method:
        if budget.kind != "none":
            raise UsageError(f"budget={budget}: method={method.label} trains what base={path} has; drop the budget")
        return same_method(path, model, method), True
    try:
        find_sites(model, method)
    except AlreadyRewritten as error:
        words = " and ".join(label_of(step.method, step.fields) for step in steps)
        why = f"it rewrites dense layers, and {words} has left none in base={path}"
        fix = f"say method={label_of(steps[-1].method, steps[-1].fields)}, which trains its factors, or lora, ssf"
        raise UsageError(f"method={method.label}: {why}; {fix}") from error
    return method, False


def same_method(path: Path, model: nn.Module, method: Method) -> Method:
    """The method that made the base, with the run's learning rate.

    Raises:
        UsageError: the run gives it other fields.
    """
    step = model.recombined.steps[-1]
    made, file = type(method)(**step.fields), conf.load("method", method.label) or {}
    plain = type(method)().settled("none", calibrates=True)
    for name in (f.name for f in fields(method) if f.name != "lr"):
        value = getattr(method, name)
        given = tuple(x) if isinstance(x := file.get(name), list) else x
        if value not in (getattr(made, name), getattr(plain, name), given):
            why = f"base={path} has {name}={shown(getattr(made, name))}, and its factors are trained as they are"
            raise UsageError(f"method.{name}={shown(value)}: {why}; drop it")
    model.recombined.steps[-1] = Step(step.method, step.fields | {"lr": method.lr}, step.layers)
    made.lr, made.label, made.key = method.lr, method.label, method.key
    return made


def fresh_head(model: nn.Module, classes: int) -> None:
    """A new classifier on a base, whatever its own told apart; the record follows."""
    record, old = model.recombined, head_of(model)
    models.reset_head(model, classes)
    new = head_of(model)
    record.trainable = record.trainable - old.keys() | new.keys()
    record.untouched -= old.keys() | new.keys()
    record.total += sum(new.values()) - sum(old.values())


def head_of(model: nn.Module) -> dict[str, int]:
    """The sizes of the head's parameters, by name."""
    head = set() if (layer := roles.head(model)) is None else {id(p) for p in layer.parameters()}
    return {name: p.numel() for name, p in model.named_parameters() if id(p) in head}
