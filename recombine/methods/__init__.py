"""The methods: one file or one folder for each paper or library. A new file here is found by itself.

Every subclass of `Method` that is not `abstract` is an attribute of this package, and so of `recombine`.
"""

from importlib import import_module
from pkgutil import walk_packages

from recombine.core.method import method_classes

for module in walk_packages(__path__, f"{__name__}."):
    import_module(module.name)
globals().update({name: cls for name, cls in method_classes().items() if cls.__module__.startswith(f"{__name__}.")})
__all__ = sorted(name for name, thing in globals().items() if isinstance(thing, type))
