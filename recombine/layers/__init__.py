"""The weight maps: one layer class for each kind. A method chooses a layer's values and what trains."""

from recombine.layers.base import RecombinedLinear
from recombine.layers.delta import DeltaLinear
from recombine.layers.factored import FactoredLinear
from recombine.layers.packed_linear import PackedLinear
from recombine.layers.scale_shift import ScaleShift
from recombine.layers.shared_basis import SharedBasisLinear

__all__ = ["DeltaLinear", "FactoredLinear", "PackedLinear", "RecombinedLinear", "ScaleShift", "SharedBasisLinear"]
