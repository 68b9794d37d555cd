"""Role names (q k v o up down gate, or a fused qkv or gate_up) for the linear layers of each model.

Beside them: norm (every normalisation), embed (the patch embedding) and reduction (Swin's patch merging).

Which layers play a role is said by the model's `Family`: one that `register` was given, a row of families.py for the
model or for models inside it, or one that infer.py makes of the names. Methods and their YAML files name roles, or
layers as `targets.py` reads them.
"""

import re
from collections.abc import Collection, Iterable

from torch import nn

from recombine.errors import AlreadyRewritten, UsageError, did_you_mean
from recombine.layers import PackedLinear
from recombine.models import fused_qkv, targets
from recombine.models.family import FUSED, Family
from recombine.models.fused_qkv import SplitLinear, as_linear, is_transposed
from recombine.models.heads import classes, head, output_layer, words
from recombine.models.lookup import family, stands_for_linear
from recombine.models.targets import ALL

__all__ = [
    "block_names", "blocks", "classes", "family", "find", "head", "layer_at", "open_layers", "output_layer",
    "role_names", "split_fused",
]  # fmt: skip

ROLES = {"o", "down", "norm", "embed", "reduction", *FUSED, *(part for parts in FUSED.values() for part in parts)}


def find(
    model: nn.Module, wanted: tuple[str, ...], kind: type | tuple[type, ...] = nn.Linear, key: str = "targets"
) -> dict[str, str]:
    """Finds the layers that these targets name: {module name: role} in model order. The model is not changed.

    A target is a role, ``all-linear``, the end of a module name, a glob or a regular expression (targets.py). ``qkv``
    is the fused layer, or the three layers q, k, v where there is none. Where q, k or v is named by itself and the
    model has them as one fused layer, the names are those that `split_fused` would give them; a fused layer that is
    rewritten already, or whose order is not known, stands for all three where all are named. The same holds for
    gate_up. Layers that are not of ``kind`` (already rewritten) are left out. A target that ends in ? may be missing.
    The role of a layer that plays none is its name inside its block. ``key`` is what errors call the targets.

    Raises:
        UsageError: nothing is named, or one twice; the model has no such layer, or all of them are rewritten already.
    """
    row = family(model)
    if not isinstance(wanted, tuple | list) or not wanted or not all(isinstance(target, str) for target in wanted):
        raise UsageError(f"{key}={wanted!r} is not a list of roles: name one or more of {' '.join(role_names(model))}")
    typed = f"{key}=[{','.join(wanted)}]"
    if twice := next((target for target in wanted if list(wanted).count(target) > 1), None):
        raise UsageError(f"{typed}: names {twice} twice; name it once")
    modules, named = _resolve(model, row, wanted)
    found: dict[str, str] = {}
    for target, names in named.items():
        if not names:
            if target.endswith("?"):
                continue
            raise UsageError(f"{typed}: {_missing(model, row, target)}")
        layers = {name: role for name, role in names.items() if _is(modules[name], kind)}
        if not layers:
            name = next(iter(names))
            kind_of, other = "role" if target.removesuffix("?") in row.roles else "target", type(modules[name]).__name__
            if "weight" in modules[name]._parameters:
                raise UsageError(
                    f"{typed}: {kind_of} {target!r} names {name}, a {other}, which the method cannot rewrite: drop it"
                )
            raise AlreadyRewritten(
                f"{typed}: {kind_of} {target!r} of {type(model).__name__} is already rewritten ({other}): "
                f"drop the {kind_of}"
            )
        found |= layers
    return {name: found[name] for name in row.ordered(modules) if name in found}


def split_fused(model: nn.Module, wanted: tuple[str, ...]) -> None:
    """Prepares the layers that these targets name, in place, so that each can be replaced by itself.

    Every fused qkv or gate_up is split of which a part is named; see `fused_qkv.call` for the rest.
    """
    named = _resolve(model, family(model), wanted)[1]
    open_layers(model, {name for names in named.values() for name in names})


def open_layers(model: nn.Module, names: Collection[str]) -> None:
    """Prepares the layers of these names, in place, as `split_fused` does; some are parts of a fused layer."""
    row, modules = family(model), dict(model.named_modules())
    fused = {
        name: parts
        for name, parts in _fused(row, modules).items()
        if not names.isdisjoint(f"{name}.{part}" for part in parts)
    }
    fused_qkv.call(model, [name for name in modules if name in fused or name in names])
    for name, parts in fused.items():
        fused_qkv.split(model, [name], parts, row.layout)


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, one of the parts of a fused layer included, as an nn.Linear that views its tensors."""
    owner, _, part = name.rpartition(".")
    fused = model.get_submodule(owner)
    if parts := next((parts for parts in FUSED.values() if part in parts and not hasattr(fused, part)), None):
        if isinstance(fused, PackedLinear):
            why = "as packed integers, which are not taken apart; name the whole layer, or apply the method first and"
            raise UsageError(f"{owner} holds {', '.join(parts)} {why} quantize then")
        fused, holder = as_linear(fused), model.get_submodule(owner.rpartition(".")[0])
        order = fused_qkv.order_of(family(model).layout, holder, fused, parts, owner)
        return fused_qkv.part_of(fused, parts, part, order)
    return as_linear(model.get_submodule(name))


def _resolve(model: nn.Module, row: Family, wanted: Collection[str]) -> tuple[dict, dict[str, dict[str, str]]]:
    """The modules by name as they are once the fused layers are split, and for each target {module name: role}."""
    modules = dict(model.named_modules())
    words = {target.removesuffix("?") for target in wanted}
    patterns = words - row.roles.keys() - ROLES
    fused = {
        name: parts
        for name, parts in _fused(row, modules).items()
        if words & set(parts) or any(_is_part(word, name, parts) for word in patterns)
    }
    modules = _as_split(modules, fused)
    named = {target: _play(row, target.removesuffix("?"), modules) for target in wanted}
    for whole, parts in FUSED.items():
        if words.issuperset(parts):  # together they are the fused layer, where that is not split
            one = {name: whole for name in _named(row, whole, modules) if not isinstance(modules[name], SplitLinear)}
            named |= {target: names | one for target, names in named.items() if target.removesuffix("?") in parts}
    layers = _candidates(model, modules) if patterns else []
    for target in wanted:
        if (word := target.removesuffix("?")) in patterns:  # fc? may also be a glob
            named[target] = _pattern(row, word, layers, modules) or _pattern(row, target, layers, modules)
    return modules, named


def _pattern(row: Family, word: str, layers: list[str], modules: dict[str, nn.Module]) -> dict[str, str]:
    """The layers that the word names without being a role, each with the role that it plays or its name."""
    if word == ALL:
        names = [name for name in layers if stands_for_linear(modules[name])]
    else:
        names = [name for name in layers if targets.names(word, name) or _splits(modules, name, word)]
    return {name: row.plays(name) or targets.in_block(name, row.blocks) for name in names}


def _splits(modules: dict[str, nn.Module], name: str, word: str) -> bool:
    """Whether it is a part of a split layer that the word names."""
    owner = name.rpartition(".")[0]
    return isinstance(modules.get(owner), SplitLinear) and targets.names(word, owner)


def _is_part(word: str, fused: str, parts: tuple[str, ...]) -> bool:
    """Whether the word names a part of the fused layer, and not the layer itself."""
    return not targets.names(word, fused) and any(targets.names(word, f"{fused}.{part}") for part in parts)


def _candidates(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """The names of all layers that hold weights, without the heads and what is inside a layer."""
    heads = [part for part in (head(model), words(model)) if part is not None]
    left_out = {id(module) for part in heads for module in part.modules()}
    found: list[str] = []
    for name, module in modules.items():
        layer = "weight" in module._parameters or stands_for_linear(module)
        if not layer or id(module) in left_out or found and name.startswith(f"{found[-1]}."):
            continue
        if not isinstance(module, SplitLinear):  # its parts are layers
            found.append(name)
    return [name for name in found if not isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)]


def _fused(row: Family, modules: dict[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """The fused layers that can be split, each with the roles of its parts."""
    return {
        name: parts
        for whole, parts in FUSED.items()
        for name in _named(row, whole, modules)
        if _is(modules[name], nn.Linear) and f"{name}.{parts[0]}" in _named(row, parts[0], [f"{name}.{parts[0]}"])
    }


def _as_split(modules: dict[str, nn.Module], fused: dict[str, tuple[str, ...]]) -> dict[str, nn.Module]:
    """The modules as they will be named once these layers are split; a part is stood for by its fused layer."""
    named = {}
    for name, module in modules.items():
        named |= {f"{name}.{part}": module for part in fused.get(name, ())} or {name: module}
    return named


def _is(module: nn.Module, kind: type | tuple[type, ...]) -> bool:
    """Neither timm's Identity for a norm that is off, nor, of a kind, an adapter that peft makes a subclass of it."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    adapted = hasattr(module, "base_layer") and nn.Module not in kinds
    fits = isinstance(module, kinds) or is_transposed(module) and nn.Linear in kinds
    return fits and not adapted and not isinstance(module, nn.Identity)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in order."""
    return [model.get_submodule(name) for name in block_names(model)]


def block_names(model: nn.Module) -> list[str]:
    """The blocks' module names in order; the last part of each is its place in its container."""
    row = family(model)
    return row.ordered(name for name, _ in model.named_modules() if re.fullmatch(row.blocks, name))


def _named(row: Family, role: str, modules: Iterable[str]) -> list[str]:
    return [name for name in modules if role in row.roles and re.fullmatch(row.roles[role], name)]


def _play(row: Family, role: str, modules: dict[str, nn.Module]) -> dict[str, str]:
    names = {name: role for name in _named(row, role, modules) if not isinstance(modules[name], SplitLinear)}
    if role in ("norm", "embed"):  # neither what holds one, nor a norm without weights
        names = {n: r for n, r in names.items() if holds_tensors(modules[n])}
    parts = {name: part for part in FUSED.get(role, ()) for name in _named(row, part, modules)}
    return names | parts


def holds_tensors(module: nn.Module) -> bool:
    """Whether it is a layer with parameters of its own, or was one before it was adapted."""
    return next(module.parameters(recurse=False), None) is not None or hasattr(module, "base_layer")


def role_names(model: nn.Module) -> list[str]:
    """The roles that targets may name in this model; a fused layer can be split into those of its parts."""
    row, modules = family(model), dict(model.named_modules())
    has = {role for role in row.roles if _play(row, role, modules)}
    has |= {part for parts in _fused(row, modules).values() for part in parts}
    return [role for role in row.roles if role in has]


def _missing(model: nn.Module, row: Family, target: str) -> str:
    """The error for a target that names no layer."""
    word, modules = target.removesuffix("?"), dict(model.named_modules())
    known = role_names(model)
    hint = did_you_mean(word, list(known))
    text = f"role {target!r} is not in {type(model).__name__}; {hint}it has {' '.join(known) or 'none by name'}"
    if whole := next((w for w, parts in FUSED.items() if word in parts and _named(row, w, modules)), None):
        return f"{text}; {whole} is one layer here: name {whole}, or all of {' '.join(FUSED[whole])}"
    if row.note:
        return f"{text}; {row.note}"
    near = targets.nearest(word, _candidates(model, modules), row.blocks)
    return f"{text}; layers with a like name: {' '.join(near)}" if near and word not in ROLES else text
