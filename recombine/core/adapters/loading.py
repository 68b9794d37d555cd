"""Loads an adapter's file onto a live model, beside those that it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recombine.core.adapters import file
from recombine.core.adapters.live import BASE, Adapter, Live, changes_since, contents, switch, tensors_of, whole
from recombine.core.checkpoint.loading import shape, try_on, without_memory
from recombine.core.rewrite import Record, Step
from recombine.core.rollback import HELD, unchanged
from recombine.core.tied import declare_tied
from recombine.core.untouched import Mark, near, total
from recombine.errors import UsageError
from recombine.models import rebuild


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", *, verify: bool = True) -> nn.Module:
    """Loads an adapter beside those that the model holds; returns the model, which stays as it is.

    `set_adapter` puts it on. The base is the model as it stands without an adapter: it must be the one that the
    adapter was trained on. Cast a model before, not after.

    Args:
        path: a file that `save_adapter` wrote.
        name: by which the other functions call it.
        verify: read the file once before, and compare it with its checksum.

    Raises:
        UsageError: there is no such file, it is damaged, it belongs to another base, or the name is taken.
    """
    inner, path = whole(model), Path(path) if isinstance(path, str) else path
    meta, tensors = file.read(path, verify)
    live = vars(inner).get(HELD, Live())
    if not isinstance(name, str) or name in ("", BASE):
        raise UsageError(f"name={name!r}: must be a word by which the adapter is called, other than {BASE}")
    if name in live.named:
        raise UsageError(f"name={name!r}: is taken; say another name, or recombine.delete_adapter(model, {name!r})")
    if type(inner).__name__ != meta["model"]:
        raise UsageError(f"{path}: is an adapter of a {meta['model']}, not of a {type(inner).__name__}")
    active = live.active
    switch(inner, live, None)
    try:
        with unchanged(inner):
            adapter = built(path, inner, live, meta, tensors)
        if not live.named:
            live.trains = [p for p in inner.parameters() if p.requires_grad]
        live.named[name] = adapter
        setattr(inner, HELD, live)
    finally:
        switch(inner, live, active)
    return model


def become(model: nn.Module, path: str | Path) -> nn.Module:
    """Puts the adapter of a file on a model that holds none, for good; returns the model.

    Raises:
        UsageError: as `load_adapter`.
    """
    switch(model, vars(load_adapter(model, path))[HELD], "default")
    delattr(model, HELD)
    return model


def built(path: Path, model: nn.Module, live: Live, meta: dict, tensors: dict[str, Tensor]) -> Adapter:
    """Puts the adapter of a file on a base for the first time, in place.

    Raises:
        UsageError: it belongs to another base.
    """
    base, before, of_base = getattr(model, "recombined", None), contents(model), tensors_of(model)
    fresh = meta | {"steps": further_steps(path, base, meta)}
    with unchanged(model):
        without_memory(model)
        try_on(path, model, tensors, fresh)
    record = base or Record(
        architecture=rebuild.architecture(model),
        frozen={n for n, p in model.named_parameters() if not p.requires_grad},
        untouched={n for n, _ in model.named_parameters()},
    )
    known = {id(p): name in record.untouched for name, p in model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        shape(path, model, fresh)
    parameters = dict(model.named_parameters())
    for name in {*meta["own"], *meta["trains"]} - parameters.keys():
        raise UsageError(f"{path}: {name} is no parameter of this model; use another file")
    compare_with_base(path, model, live, meta["own"], known)
    put(model, tensors, known)
    parameters = dict(model.named_parameters())
    untouched = {n for n in meta["own"] if known.get(id(parameters[n]), base is None)}
    for name, p in parameters.items():
        p.requires_grad_(name in meta["trains"])
    model.recombined = Record(
        steps=[Step(*step) for step in meta["steps"]],
        **{key: meta[key] for key in ("targets", "dense", "total", "blocks")},
        untouched=untouched,
        trainable=set(meta["trains"]),
        architecture=record.architecture,
        frozen=record.frozen,
        notes=list(record.notes),
        marks={name: meta["own"][name] for name in untouched},
        bits=dict(record.bits),
    )
    declare_tied(model)
    added, now = [parameters[name] for name in meta["trains"]], tensors_of(model)
    return Adapter(
        classes=meta["classes"],
        labels=meta["labels"] and tuple(meta["labels"]),
        parameters=sum(p.numel() for p in added),
        bytes=sum(p.numel() * p.element_size() for p in added),
        changes=changes_since(before),
        tensors=[t for key, t in now.items() if key not in of_base],
        replaced=[t for key, t in of_base.items() if key not in now],
    )


def further_steps(path: Path, base: Record | None, meta: dict) -> list:
    """The steps of an adapter that its base does not have.

    Raises:
        UsageError: the base has others.
    """
    there = [] if base is None else base.steps
    for i, step in enumerate(there):
        if i >= len(meta["steps"]) or (step.method, plain(step.layers)) != (meta["steps"][i][0], meta["steps"][i][2]):
            made, here = (" and ".join(step[0] for step in steps) or "nothing" for steps in (meta["steps"], there))
            why = f"it was trained after {made}, and this model is made by {here}, with other layers"
            raise UsageError(f"{path}: belongs to another base: {why}; load the base that it was trained on")
    return meta["steps"][len(there) :]


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def compare_with_base(path: Path, model: nn.Module, live: Live, own: dict[str, Mark], known: dict[int, bool]) -> None:
    """Compares what the file leaves to the base with the model, and lets adapters share what is not the base's own.

    Args:
        known: by the id of a parameter, those that the base has.

    Raises:
        UsageError: a tensor has other values.
    """
    parameters, shared = dict(model.named_parameters()), {}
    for name, mark in own.items():
        p = parameters[name]
        if not same(live, p, mark):
            what = "has other values" if id(p) in known else "is not there"
            fix = "load the base that it was trained on, which any recombine.save of that model holds"
            raise UsageError(f"{path}: belongs to another base: {name} {what} in this model; {fix}")
        if id(p) not in known:
            shared[id(p)] = p, live.parts.setdefault((name, mark.total), p)
    replace(model, shared)


def same(live: Live, p: Tensor, mark: Mark) -> bool:
    """`untouched.same`, which reads a tensor once for all adapters."""
    if p.dtype != mark.dtype:
        return near(p, mark.entries, 1e-2)
    before = live.totals.get(id(p))
    if before is None or before[0] is not p or before[1] != p._version:
        before = live.totals[id(p)] = (p, p._version, total(p))
    return before[2] == mark.total


@torch.no_grad()
def put(model: nn.Module, tensors: dict[str, Tensor], known: dict[int, bool]) -> None:
    """Puts an adapter's tensors into a model that they fit, in new parameters where these were the base's."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    like = next(p for p in parameters.values() if id(p) in known) if known else next(iter(parameters.values()))
    head = file.head_of(model)
    new = {}
    for name, tensor in tensors.items():
        if name in buffers:
            if not torch.equal(buffers[name].cpu(), tensor):
                owner, _, leaf = name.rpartition(".")
                model.get_submodule(owner)._buffers[leaf] = tensor.to(buffers[name], copy=True)
            continue
        p = parameters[name]
        dtype = like.dtype if id(p) in head and id(p) not in known and p.is_floating_point() else p.dtype
        new[id(p)] = p, nn.Parameter(tensor.to(like.device, dtype, copy=True), requires_grad=False)
    replace(model, new)


def replace(model: nn.Module, new: dict[int, tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Puts parameters in all places of others. new: (old, new) by the old one's id."""
    for module in model.modules():
        for leaf, p in module._parameters.items():
            if id(p) in new:
                module._parameters[leaf] = new[id(p)][1]
