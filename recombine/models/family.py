"""What a model family is: regular expressions that say which of a model's layers play which role."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import nn

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # role of a fused layer -> roles of its parts


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the layers, blocks and heads of an architecture are. A regular expression matches a whole name.

    A layer that holds several projections has the role qkv or gate_up. Its parts are named as if they were its
    children: ``"q": r"blocks\\.\\d+\\.attn\\.qkv\\.q"``. Without such names it is one layer that cannot be split.

    Args:
        classes: regex over the names of the model's class and its parents.
        roles: role -> regex over module names.
        blocks: regex over module names.
        head: regex over the names of the model's children that are its classifier; used where it has no
            get_classifier().
        layout: (module that holds the fused layer, fused layer) -> `fused_qkv.Layout` of its outputs; None: by the
            holder's class, else equal parts one after the other.
        order: module name -> a number that is larger for what runs later; None: modules run as they are registered.
        note: why roles are missing and what to do, for errors.
    """

    classes: str
    roles: dict[str, str]
    blocks: str
    head: str = "classifier|score|head"
    layout: Callable[[nn.Module, nn.Linear], tuple] | None = None
    order: Callable[[str], int] | None = None
    note: str = ""

    def fits(self, model: nn.Module) -> bool:
        """Whether class and layers have such names. Another library may have a class of the same name."""
        if not any(re.fullmatch(self.classes, cls.__name__) for cls in type(model).__mro__):
            return False
        layers = "|".join(f"(?:{x})" for role, x in self.roles.items() if role not in ("norm", "embed"))
        return any(re.fullmatch(layers, name) for name, _ in model.named_modules())

    def plays(self, name: str) -> str | None:
        """The role of the module of that name; None: it has none."""
        return next((role for role, pattern in self.roles.items() if re.fullmatch(pattern, name)), None)

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Names of modules, as registered, in the order in which they run."""
        return list(names) if self.order is None else sorted(names, key=self.order)

    def inside(self, name: str) -> "Family":
        """The family of a model that holds one of this family as its submodule of that name."""
        start = re.escape(name) + r"\."
        roles = {role: rf"{start}(?:{pattern})" for role, pattern in self.roles.items()}
        return replace(self, roles=roles, blocks=rf"{start}(?:{self.blocks})", head="classifier|score|head|fc")


def joined(rows: list[Family]) -> Family:
    """One family for a model that holds several."""
    if len(rows) == 1:
        return rows[0]
    names = dict.fromkeys(role for row in rows for role in row.roles)
    roles = {name: "|".join(f"(?:{row.roles[name]})" for row in rows if name in row.roles) for name in names}
    notes = " ".join(dict.fromkeys(filter(None, (row.note for row in rows))))
    layout = next((row.layout for row in rows if row.layout), None)
    blocks = "|".join(f"(?:{row.blocks})" for row in rows)
    order = next((row.order for row in rows if row.order), None)
    return replace(rows[0], roles=roles, blocks=blocks, layout=layout, order=order, note=notes)
