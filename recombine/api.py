"""What `import recombine` offers."""

from recombine import export
from recombine.core.account import Account, count
from recombine.core.adapters import (
    adapters,
    delete_adapter,
    disable_adapters,
    load_adapter,
    mixed,
    save_adapter,
    set_adapter,
)
from recombine.core.budget import Budget
from recombine.core.checkpoint import load, merge, save
from recombine.core.method import Method, Site
from recombine.core.quantizing import quantize
from recombine.core.rewrite import Record, Step, apply, finish, train_only
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.methods import *  # noqa: F403
from recombine.methods import __all__ as _methods
from recombine.methods.adapters.peft_config import peft_config
from recombine.models.family import Family
from recombine.models.fused_qkv import Layout
from recombine.models.lookup import register

__all__ = [
    "Account",
    "Budget",
    "Family",
    "Layout",
    "Method",
    "RecombinedLinear",
    "Record",
    "Site",
    "Step",
    "UsageError",
    "adapters",
    "apply",
    "count",
    "delete_adapter",
    "disable_adapters",
    "export",
    "finish",
    "load",
    "load_adapter",
    "merge",
    "mixed",
    "peft_config",
    "quantize",
    "register",
    "save",
    "save_adapter",
    "set_adapter",
    "train_only",
    *_methods,
]
