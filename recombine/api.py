"""What `import recombine` offers."""

from recombine.core.budget import Account, Budget, count
from recombine.core.checkpoint import load, merge, save
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.methods import *  # noqa: F403
from recombine.methods import __all__ as _methods

__all__ = ["Account", "Budget", "RecombinedLinear", "UsageError", "count", "load", "merge", "save", *_methods]
