"""The weight maps. A kind of map is one layer class; a method chooses its values and what trains."""

from recombine.layers.base import RecombinedLinear
from recombine.layers.delta import DeltaLinear
from recombine.layers.factored import FactoredLinear
from recombine.layers.scale_shift import ScaleShift
from recombine.layers.shared_basis import SharedBasisLinear

__all__ = ["DeltaLinear", "FactoredLinear", "RecombinedLinear", "ScaleShift", "SharedBasisLinear"]
