"""The layers that a checkpoint names."""

from recombine.errors import UsageError
from recombine.layers import RecombinedLinear


def layer_class(kind: str) -> type[RecombinedLinear]:
    """The subclass of RecombinedLinear with that name: "FactoredLinear", for example.

    Raises:
        UsageError: there is none.
    """
    known = {cls.__name__: cls for cls in RecombinedLinear.__subclasses__()}
    if kind not in known:
        raise UsageError(f"there is no layer {kind}; import the module that defines it")
    return known[kind]
