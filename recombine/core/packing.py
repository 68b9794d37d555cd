"""Which weights of a model are packed, and what they take then: known before anything is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from recombine.core.method import Method, Site
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.layers.packed import BITS
from recombine.models import roles

GROUPS = range(8, 2**16 + 1, 8)  # entries that one scale may have
MIX = "mix"  # every layer has bits of its own, which the method chose together with its rank
BESIDE = 8  # bits under a mix of linear layers that are no target


@dataclass(frozen=True)
class Packing:
    """How weights are packed.

    Args:
        bits: of an integer, or MIX. group: consecutive entries that share a scale.
        trains: what the method trains stays in float; False: it is frozen by then.

    Raises:
        UsageError: bits or group are not possible.
    """

    bits: int | str
    group: int = 64
    trains: bool = True

    def __post_init__(self):
        if self.bits not in (*BITS, MIX) or isinstance(self.bits, float):
            raise UsageError(f"quantize.bits={self.bits}: weights are packed to 8 or 4 bits; say one of these, or null")
        if self.group not in GROUPS or isinstance(self.group, float):
            raise UsageError(f"quantize.group={self.group}: must be a multiple of 8 from 8 to {GROUPS[-1]}; say 64")

    def bytes(self, weights: int) -> float:
        """What so many weights take, with their scales; of a mix, those beside its targets."""
        return weights * ((BESIDE if self.bits == MIX else self.bits) / 8 + 2 / self.group)


def linear_layers(model: nn.Module) -> Iterator[str]:
    """Names of the layers that are packed: what a method rewrote, and the linear layers of the blocks."""
    record, blocks = getattr(model, "recombined", None), ()
    try:
        blocks = tuple(f"{name}." for name in roles.block_names(model))
    except UsageError:  # a model without known blocks
        if record is None:
            raise
    inside = tuple(f"{name}." for name in (record.targets if record else ()))
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | RecombinedLinear) and f"{name}.".startswith((*inside, *blocks)):
            yield name


def sizes_beside(model: nn.Module, sites: list[Site]) -> list[int]:
    """Weights of each layer that is packed and no target."""
    own = {site.name for site in sites}
    return [model.get_submodule(name).weight.numel() for name in linear_layers(model) if name not in own]


def saving(method: Method, model: nn.Module, sites: list[Site], packing: Packing) -> Callable[[], float]:
    """How many weights fewer the packed model is worth in bytes, at least, as a function of the method as it stands.

    A diagonal in each layer is left out, which stays in float, and the last group of a tensor counts as full.
    """
    size, beside = sites[0].module.weight.element_size(), sizes_beside(model, sites)
    others = sum(beside)
    vectors = sum(min(site.module.weight.shape) for site in sites)
    ends = (len(beside) + 3 * len(sites)) * packing.bytes(packing.group)

    def saved() -> float:
        trained = method.sizes(sites)[1] if packing.trains else 0
        packed = max(0, method.retained_weights(sites) - trained - vectors) + others
        return packed - (packing.bytes(packed) + ends) / size

    return saved
