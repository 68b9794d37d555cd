"""Role names (q k v o up down gate, or a fused qkv) for the linear layers of each model family.

Beside them: norm (every normalisation), embed (the patch embedding) and reduction (Swin's patch merging).

A family is one row of FAMILIES: its class names -> a regular expression over module names for every role, for its
blocks and for its head. To add a family, add a row; methods and their YAML files name roles only.
"""

import re
from dataclasses import dataclass

from torch import nn

from recombine.errors import UsageError, did_you_mean
from recombine.models import fused_qkv
from recombine.models.fused_qkv import SplitQKV


@dataclass(frozen=True)
class Family:
    """One row of FAMILIES: the regular expressions that find a family's layers, blocks and head."""

    roles: dict[str, str]  # role -> regex that a module's whole name matches
    blocks: str
    head: str  # used where the model has no get_classifier()


def _fused(block: str, **more: str) -> Family:
    """The family of a timm model, whose attn.qkv is one layer until it is split. block: regex of a block's name."""
    parts = {role: rf"{block}\.attn\.qkv\.{role}" for role in "qkv"}
    rest = {
        "o": rf"{block}\.attn\.proj",
        "up": rf"{block}\.mlp\.fc1",
        "down": rf"{block}\.mlp\.fc2",
        "norm": rf"(?:{block}|layers\.\d+\.downsample|patch_embed)\.norm[12]?|norm|fc_norm",
        "embed": r"patch_embed\.proj",
    }
    return Family({"qkv": rf"{block}\.attn\.qkv", **parts, **rest, **more}, blocks=block, head="head")


_BERT, _LLAMA = r"(?:\w+\.)?encoder\.layer\.\d+", r"(?:\w+\.)?layers\.\d+"
_AFTER_ATTENTION = {
    "o": rf"{_BERT}\.attention\.output\.dense",
    "up": rf"{_BERT}\.intermediate\.dense",
    "down": rf"{_BERT}\.output\.dense",
    "norm": rf"(?:{_BERT}\.(?:attention\.)?output|(?:\w+\.)?embeddings)\.LayerNorm",
}

FAMILIES = {  # regex over the names of the model's class and its parents
    r"VisionTransformer": _fused(r"blocks\.\d+"),
    r"SwinTransformer": _fused(r"layers\.\d+\.blocks\.\d+", reduction=r"layers\.\d+\.downsample\.reduction"),
    r"BertPreTrainedModel": Family(
        {
            "q": rf"{_BERT}\.attention\.self\.query",
            "k": rf"{_BERT}\.attention\.self\.key",
            "v": rf"{_BERT}\.attention\.self\.value",
            **_AFTER_ATTENTION,
        },
        blocks=_BERT,
        head="classifier|qa_outputs",
    ),
    r"DebertaV2PreTrainedModel": Family(
        {
            "q": rf"{_BERT}\.attention\.self\.query_proj",
            "k": rf"{_BERT}\.attention\.self\.key_proj",
            "v": rf"{_BERT}\.attention\.self\.value_proj",
            **_AFTER_ATTENTION,
        },
        blocks=_BERT,
        head="classifier|qa_outputs",
    ),
    r"LlamaPreTrainedModel": Family(
        {
            **{role: rf"{_LLAMA}\.self_attn\.{role}_proj" for role in "qkvo"},
            **{role: rf"{_LLAMA}\.mlp\.{role}_proj" for role in ("gate", "up", "down")},
            "norm": rf"{_LLAMA}\.(?:input|post_attention)_layernorm|(?:\w+\.)?norm",
        },
        blocks=_LLAMA,
        head="score",
    ),
}


def family(model: nn.Module) -> Family:
    """The row of FAMILIES that the model's class or one of its parents belongs to.

    Raises:
        UsageError: there is no such row.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    for pattern, row in FAMILIES.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return row
    known = ", ".join(FAMILIES)
    raise UsageError(
        f"{names[0]} belongs to no known model family ({known}): add a row to FAMILIES in recombine/models/roles.py"
    )


def find(
    model: nn.Module, targets: tuple[str, ...], kind: type | tuple[type, ...] = nn.Linear, key: str = "targets"
) -> dict[str, str]:
    """Finds the layers that play these roles: {module name: role} in model order. The model is not changed.

    ``qkv`` is the fused layer, or the three layers q, k, v where there is none. Where q, k or v is named by itself and
    the model has them as one fused layer, the names are those that `split_fused` would give them. Layers that are not
    of ``kind`` (already rewritten) are left out. A role that ends in ? may be missing. ``key`` is what errors call the
    targets.

    Raises:
        UsageError: no role is named, or one twice; the model has no layer of a role, or all are rewritten already.
    """
    row = family(model)
    if not targets or isinstance(targets, str):
        raise UsageError(f"{key}={targets!r} is not a list of roles: name one or more of {_had(model, row)}")
    if twice := next((target for target in targets if list(targets).count(target) > 1), None):
        raise UsageError(f"{key}=[{','.join(targets)}]: names {twice} twice; name it once")
    modules = _as_split(dict(model.named_modules()), _to_split(model, targets))
    wanted: dict[str, str] = {}
    for target in targets:
        names = _play(row, target.removesuffix("?"), modules)
        if not names:
            if target.endswith("?"):
                continue
            hint = did_you_mean(target, _had(model, row).split())
            what = f"{key}=[{','.join(targets)}]: {type(model).__name__} has no role {target}"
            raise UsageError(f"{what}; {hint}it has {_had(model, row)}")
        layers = {name: role for name, role in names.items() if _is(modules[name], kind)}
        if not layers:
            other = type(modules[next(iter(names))]).__name__
            what = f"{key}=[{','.join(targets)}]: role {target} of {type(model).__name__}"
            raise UsageError(f"{what} is already rewritten ({other}): drop the role")
        wanted |= layers
    return {name: wanted[name] for name in modules if name in wanted}


def split_fused(model: nn.Module, targets: tuple[str, ...]) -> None:
    """Splits every fused qkv, in place, where these targets name q, k or v by itself."""
    fused_qkv.split(model, _to_split(model, targets))


def _to_split(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names of the fused layers that are to be split for these targets."""
    row = family(model)
    if "qkv" not in row.roles or not {target.removesuffix("?") for target in targets} & set("qkv"):
        return []
    modules = dict(model.named_modules())
    return [name for name in _named(row, "qkv", modules) if isinstance(modules[name], nn.Linear)]


def _as_split(modules: dict[str, nn.Module], fused: list[str]) -> dict[str, nn.Module]:
    """The modules as they will be named once these layers are split; a part is stood for by its fused layer."""
    named = {}
    for name, module in modules.items():
        named |= {f"{name}.{role}": module for role in "qkv"} if name in fused else {name: module}
    return named


def _is(module: nn.Module, kind: type | tuple[type, ...]) -> bool:
    """Neither timm's Identity for a norm that is off, nor, of a kind, an adapter that peft makes a subclass of it."""
    adapted = hasattr(module, "base_layer") and kind not in (nn.Module, (nn.Module,))
    return isinstance(module, kind) and not adapted and not isinstance(module, nn.Identity)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in order."""
    return [model.get_submodule(name) for name in block_names(model)]


def block_names(model: nn.Module) -> list[str]:
    """The blocks' module names in order; the last part of each is its place in its container."""
    pattern = family(model).blocks
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def head(model: nn.Module) -> nn.Module | None:
    """The classifier; None where the model ends in features, or in words: a language model's head is pretrained."""
    if hasattr(model, "get_classifier"):
        classifier = model.get_classifier()
    else:
        classifier = next((m for name, m in model.named_children() if re.fullmatch(family(model).head, name)), None)
    return None if isinstance(classifier, nn.Identity) else classifier


def _named(row: Family, role: str, modules: dict[str, nn.Module]) -> list[str]:
    return [name for name in modules if role in row.roles and re.fullmatch(row.roles[role], name)]


def _play(row: Family, target: str, modules: dict[str, nn.Module]) -> dict[str, str]:
    names = {name: target for name in _named(row, target, modules) if not isinstance(modules[name], SplitQKV)}
    if target != "qkv":
        return names
    return names | {name: role for role in "qkv" for name in _named(row, role, modules)}


def _had(model: nn.Module, row: Family) -> str:
    modules = dict(model.named_modules())
    has = {role for role in row.roles if _play(row, role, modules)}
    return " ".join(role for role in row.roles if role in has or (role in "qkv" and "qkv" in has))  # a fused qkv splits
