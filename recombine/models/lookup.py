"""Which family a model belongs to."""

import logging
import re
from collections.abc import Mapping

from torch import nn

from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.models.families import FAMILIES
from recombine.models.family import Family, joined
from recombine.models.fused_qkv import SplitLinear, is_transposed
from recombine.models.infer import infer
from recombine.models.targets import in_block

log = logging.getLogger(__name__)

REGISTERED: list[Family] = []
SAID: set[str] = set()


def register(family: Family) -> Family:
    """Makes a family known, so that every method, count, save and load works on its models; returns it.

    It goes before the families that are known already, the last one first.

    Raises:
        UsageError: it is no Family, its roles are no dict, its layout is no function, or one of its patterns is no
            regular expression.
    """
    if not isinstance(family, Family):
        raise UsageError(f"register({family!r}): give a recombine.Family(classes=..., roles={{...}}, blocks=...)")
    if not isinstance(family.roles, Mapping):
        raise UsageError(f"Family.roles={family.roles!r}: give a dict, {{role: regular expression}}")
    if not (family.layout is None or callable(family.layout)):
        raise UsageError(
            f"Family.layout={family.layout!r}: give a function (holder, fused) -> recombine.Layout, or None"
        )
    patterns = {"classes": family.classes, "blocks": family.blocks, "head": family.head}
    for field, pattern in (patterns | {f"roles[{role!r}]": text for role, text in family.roles.items()}).items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UsageError(f"Family.{field}={pattern!r}: no regular expression ({error}); correct it") from error
    REGISTERED.insert(0, family)
    return family


def family(model: nn.Module) -> Family:
    """The family of a model; of a model that holds others, the families of those.

    Raises:
        UsageError: it has no linear layers in numbered blocks, so that nothing can be inferred either.
    """
    rows, inside = [], ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if row := next((row for row in (*REGISTERED, *FAMILIES) if row.fits(module)), None):
            if not name:
                return row
            rows, inside = [*rows, row.inside(name)], f"{name}."
    if rows:
        return joined(rows)
    layers = linear_layers(model)
    if (guess := infer(model, layers)) is None:
        raise UsageError(
            f"{type(model).__name__} belongs to no known model family and has no numbered blocks of linear layers: "
            f"describe it with recombine.register(recombine.Family(...))"
        )
    body = (name for name in layers if not re.fullmatch(guess.head, name.partition(".")[0]))
    blank = {in_block(name, guess.blocks) for name in body if not guess.plays(name)}
    _say(f"{type(model).__name__} is of no known family: {' '.join(guess.roles)} by name and shape, no role for", blank)
    return guess


def _say(text: str, names: set[str]) -> None:
    """Logs it once."""
    line = f"{text} {' '.join(sorted(names)) or 'none'}"
    if line not in SAID:
        SAID.add(line)
        log.info(line)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers and what stands for one (rewritten, adapted, split), by module name; not what is inside those.

    The projections of nn.MultiheadAttention are left out: it reads their weights and never calls them.
    """
    found, inside = {}, None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if isinstance(module, nn.MultiheadAttention):
            inside = f"{name}."
        elif stands_for_linear(module):
            found[name], inside = module, f"{name}."
    return found


def stands_for_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, or was one before it was rewritten, adapted or split."""
    base = getattr(module, "base_layer", module)  # of an adapter
    return isinstance(base, nn.Linear | RecombinedLinear | SplitLinear) or is_transposed(base)
