"""The adapters that a live model holds, one of which may be on.

An adapter is what the base's modules hold with it, beside what they hold without it. Putting it on exchanges these
tables. The tensors themselves stay where they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from recombine.core.rollback import CONTAINERS, HELD
from recombine.errors import UsageError, did_you_mean
from recombine.models.wrappers import unwrapped

BASE = "__base__"  # peft's name for no adapter
OWN = {HELD, "training", "_kept", *CONTAINERS}  # attributes that are not exchanged


class Missing:
    """Stands for an attribute that is not there."""


class Change(NamedTuple):
    """What one module, or the model's configuration, holds without an adapter and with it.

    table: one of `rollback.CONTAINERS`, which is exchanged whole; None: the attributes of these names.
    """

    owner: Any
    table: str | None
    without: Any
    with_it: Any

    def put(self, on: bool, device: torch.device) -> None:
        """Exchanges the contents. What comes in gets its owner's mode, and what was built of others is dropped.

        `Module.to` gives a module new buffers: those that go are kept as they are now, those that come are moved.
        """
        content, other = (self.with_it, self.without) if on else (self.without, self.with_it)
        if self.table is None:
            for key, value in content.items():
                if value is Missing:
                    vars(self.owner).pop(key, None)
                else:
                    vars(self.owner)[key] = value
            return
        held = vars(self.owner)[self.table]
        if self.table == "_buffers":
            content.update({key: held[key] for key in held if key in content and content[key] is other.get(key)})
            other.clear()
            other.update(held)
            move((b for b in content.values() if b is not None), device)
        held.clear()
        held.update(content)
        if self.table == "_modules":
            for child in (child for key, child in content.items() if child is not None and child is not other.get(key)):
                child.train(self.owner.training)
                move(child.buffers(), device)
        elif "_kept" in vars(self.owner):
            vars(self.owner)["_kept"] = None


@dataclass
class Adapter:
    """An adapter in memory.

    classes: that its head tells apart; None: it has no head. labels: their names, if the file says them.
    parameters: of the adapter's own, its head included. bytes: of these.
    """

    classes: int | None
    labels: tuple[str, ...] | None
    parameters: int
    bytes: int
    changes: list[Change] = field(repr=False)
    tensors: list[Tensor] = field(repr=False)  # that the base does not have
    replaced: list[Tensor] = field(repr=False)  # of the base, that are not there with it


@dataclass
class Live:
    """What a model holds.

    named: the adapters. active: the one that is on; None: the base. trains: parameters of the base that train where no
    adapter is on.
    totals: of tensors that were compared with a file's marks: (tensor, its version, `untouched.total`), by id.
    parts: frozen tensors that adapters share and the base has in another form (the parts of a fused layer).
    """

    named: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    trains: list[nn.Parameter] = field(default_factory=list)
    totals: dict[int, tuple] = field(default_factory=dict)
    parts: dict[tuple, nn.Parameter] = field(default_factory=dict)
    mixing: bool = False  # inside `mixed`, where no adapter is put on or off


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that the model holds, by name, the one that is on first."""
    live = vars(unwrapped(model)).get(HELD, Live())
    return dict(sorted(live.named.items(), key=lambda item: item[0] != live.active))


def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Puts an adapter of the model on, in the place of the one that is on; returns the model.

    Only what the adapter trains is trainable then. No weight of the base is moved or copied.

    Raises:
        UsageError: no adapter of that name is loaded.
    """
    inner, live = held(model, name)
    switch(inner, live, name)
    return model


def disable_adapters(model: nn.Module) -> nn.Module:
    """Takes the adapter off: the model is its base again. The adapters stay in memory. Returns the model."""
    inner = whole(model)
    if (live := vars(inner).get(HELD)) is not None:
        switch(inner, live, None)
    return model


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Takes an adapter out of memory; returns the model, which is its base where that adapter was on.

    Raises:
        UsageError: no adapter of that name is loaded.
    """
    inner, live = held(model, name)
    if live.active == name:
        switch(inner, live, None)
    del live.named[name]
    if not live.named:
        delattr(inner, HELD)
    return model


def whole(model: nn.Module) -> nn.Module:
    """The model itself, which torch.compile may have wrapped.

    Raises:
        UsageError: it is no module, or is wrapped in what keeps a list of its parameters.
    """
    inner = unwrapped(model)
    if isinstance(model, DataParallel | DistributedDataParallel):
        why = "keeps a list of its parameters, which an adapter would exchange: give model.module, then wrap it"
        raise UsageError(f"model is wrapped in {type(model).__name__}, which {why}")
    return inner


def held(model: nn.Module, *names: str) -> tuple[nn.Module, Live]:
    """The model itself and what it holds, which has adapters of these names.

    Raises:
        UsageError: it has not.
    """
    model = whole(model)
    live = vars(model).get(HELD, Live())
    for name in names:
        if name not in live.named:
            known = ", ".join(live.named) or "none; load one with recombine.load_adapter(model, FILE, name=...)"
            hint = did_you_mean(str(name), list(live.named))
            raise UsageError(f"adapter {name!r} is not loaded; {hint}the model holds {known}")
    return model, live


def switch(model: nn.Module, live: Live, name: str | None) -> None:
    """Exchanges the adapter that is on for another; None: for the base."""
    if live.mixing:
        why = "adapters cannot be loaded, put on or off, or deleted inside recombine.mixed"
        raise UsageError(f"{why}: end the block first")
    if name == live.active:
        return
    device = next(model.parameters()).device
    if live.active is not None:
        old = live.named[live.active]
        for change in reversed(old.changes):
            change.put(False, device)
        move(old.replaced, device)
    if name is not None:
        new = live.named[name]
        for change in new.changes:
            change.put(True, device)
        move(new.tensors, device)
    for p in live.trains:
        p.requires_grad_(name is None)
    live.active = name


def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Brings what was off to the device that the model may have been moved to."""
    for tensor in tensors:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


def tensors_of(model: nn.Module) -> dict[int, Tensor]:
    """Its parameters and buffers, by id."""
    return {id(t): t for t in (*model.parameters(), *model.buffers())}


def contents(model: nn.Module) -> list[tuple[Any, dict, dict]]:
    """What every module, and the model's configuration, holds now: (owner, attributes, containers by name)."""
    found = [
        (m, {k: v for k, v in vars(m).items() if k not in OWN}, {key: vars(m)[key].copy() for key in CONTAINERS})
        for m in model.modules()
    ]
    config = getattr(model, "config", None)
    return [*found, (config, dict(vars(config)), {})] if hasattr(config, "__dict__") else found


def changes_since(before: Sequence[tuple[Any, dict, dict]]) -> list[Change]:
    """What is different now from what `contents` gave."""
    found = []
    for owner, attributes, containers in before:
        for key, content in containers.items():
            now = vars(owner)[key]
            if isinstance(now, set) and now != content or isinstance(now, dict) and not same_items(now, content):
                found.append(Change(owner, key, content, now.copy()))
        now = {k: v for k, v in vars(owner).items() if k not in OWN}
        names = [k for k in {**attributes, **now} if attributes.get(k, Missing) is not now.get(k, Missing)]
        if names:
            pair = ({k: held.get(k, Missing) for k in names} for held in (attributes, now))
            found.append(Change(owner, None, *pair))
    return found


def same_items(one: dict, other: dict) -> bool:
    """Whether two tables hold the same objects in the same order."""
    return list(one) == list(other) and all(one[key] is other[key] for key in one)
