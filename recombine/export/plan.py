"""What a recombined model is to an exported folder: a plan of its layers for config.json, and their tensors.

A layer's plan is an entry that `hf_layers.made` reads. What inference folds is folded: a core goes into the factor
beside it, a delta into its weight.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from recombine.core.checkpoint.merging import merged
from recombine.errors import UsageError
from recombine.export.cut import structures
from recombine.export.plan_packed import bits_of, identity, say_unpacked, stored
from recombine.layers import DeltaLinear, FactoredLinear, PackedLinear, RecombinedLinear, ScaleShift, SharedBasisLinear
from recombine.layers.packed import Packed
from recombine.models.fused_qkv import OPENED, READS, TRANSPOSED, SplitLinear
from recombine.runtime.mapped import on_disk


@dataclass
class Plan:
    """layers: entry by module name. shared: (inputs, outputs) by key. tensors: by the names of the exported model.

    attributes: what else differs from the plain model, by module name. turns: of `models.rotary`, likewise.

    keys: of the shared matrices, by identity.
    """

    layers: dict[str, dict] = field(default_factory=dict)
    attributes: dict[str, dict] = field(default_factory=dict)
    shared: dict[str, list[int]] = field(default_factory=dict)
    turns: dict[str, list[list[int]]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)

    def told(self) -> dict[str, dict]:
        """What stands under `recombined` in config.json."""
        told = {"layers": self.layers, "shared": self.shared, "attributes": self.attributes}
        return told | ({"turns": self.turns} if self.turns else {})

    def share(self, matrix: Tensor | Packed) -> str:
        """The key of a matrix that several layers use; it is taken up once."""
        if id(matrix) not in self.keys:
            key = self.keys[id(matrix)] = str(len(self.keys))
            self.shared[key] = [matrix.shape[1], matrix.shape[0], *bits_of(matrix)]
            self.tensors |= {f"shared_bases.{name}": tensor for name, tensor in stored(key, matrix).items()}
        return self.keys[id(matrix)]


@torch.no_grad()
def planned(model: nn.Module, folder: Path) -> Plan:
    """The plan of a recombined model.

    Args:
        folder: in which what is folded lies as pages of nameless files, so that not all of it is held at once.

    Raises:
        UsageError: a layer cannot be written in plain torch.
    """
    plan = Plan()
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    common = {key for key in uses if uses.count(key) > 1}
    for name, module in model.named_modules():
        if isinstance(module, SplitLinear):
            plan.layers[name] = {"kind": "split", **split(module)}
        if getattr(module, READS, None) == OPENED:
            plan.attributes[name] = {READS: OPENED}
        for child in getattr(module, TRANSPOSED, ()):
            if type(layer := module.get_submodule(child)) is nn.Linear:
                plan.layers[f"{name}.{child}".lstrip(".")] = linear_spec(layer)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    inside = ()  # beginnings of the names of what is taken from its layer
    for name, layer in replaced(model).items():
        plan.layers[name], tensors = planned_layer(name, layer, plan, common)
        for key, tensor in tensors.items():
            new = tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() not in own and tensor.ndim > 1
            plan.tensors[f"{name}.{key}"] = on_disk(tensor, folder) if new else tensor
        inside += (f"{name}.",)
    say_unpacked(model, plan.tensors)
    kept = dict(model.named_parameters()) | {k: b for k, b in model.named_buffers() if k in model.state_dict()}
    plan.tensors |= {name: tensor for name, tensor in kept.items() if not name.startswith(inside)}
    plan_cuts(model, plan)
    return plan


def replaced(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are not what the plain model has there, by name: rewritten, adapted or packed."""
    inside = tuple(f"{name}." for name in model.recombined.targets)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear) and not f"{n}.".startswith(inside)}
    targets = {name: model.get_submodule(name) for name in model.recombined.targets}
    kinds = RecombinedLinear | ScaleShift | PackedLinear
    return {n: m for n, m in targets.items() if isinstance(m, kinds) or hasattr(m, "get_base_layer")} | packed


def plan_cuts(model: nn.Module, plan: Plan) -> None:
    """Adds the smaller linear layers, the numbers of modules and the selected turns to a plan.

    What else was cut, such as norms or whole blocks, is left: the comparison with the file's tensors refuses it.
    """
    modules = dict(model.named_modules())
    split = tuple(f"{name}." for name, module in modules.items() if isinstance(module, SplitLinear))
    for structure in structures(model):
        for name, module in modules.items():
            cut = f"{name}.weight" in structure["shapes"] and type(module) is nn.Linear
            if cut and name not in plan.layers and not name.startswith(split or ("\0",)):
                plan.layers[name] = linear_spec(module)
        for path, value in structure["attributes"].items():
            name, _, key = path.rpartition(".")
            if name not in plan.layers and not isinstance(value, list):
                plan.attributes.setdefault(name, {})[key] = value
        plan.turns |= structure.get("rotary") or {}


def split(module: SplitLinear) -> dict:
    """The entry of a fused layer that stands as its parts."""
    layers = [getattr(module, name) for name in module.parts]
    return {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "parts": list(module.parts),
        "groups": module.layout.groups,
        "widths": list(module.layout.widths),
        "bias": [getattr(layer, "bias", None) is not None for layer in layers],
    }


def linear_spec(layer: nn.Linear) -> dict:
    """The entry of a plain layer."""
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    return {"kind": "linear", **sizes, "bias": layer.bias is not None}


def planned_layer(name: str, layer: nn.Module, plan: Plan, common: set[int]) -> tuple[dict | None, dict[str, Tensor]]:
    """(entry or None for a layer that is plain already, tensors by their names inside) of one layer.

    Args:
        common: identities of the parameters that several layers use.
    """
    if hasattr(layer, "get_base_layer"):
        return adapted(name, layer, plan, common)
    if isinstance(layer, ScaleShift):
        base, tensors = planned_layer(name, layer.base_layer, plan, common)
        spec = {"kind": "scaled", "base": base, "width": len(layer.gamma), "channels": list(layer.channels)}
        tensors = {f"base_layer.{key}": tensor for key, tensor in tensors.items()} | {"gamma": layer.gamma}
        return spec | {"beta": layer.beta is not None}, tensors | ({} if layer.beta is None else {"beta": layer.beta})
    if not isinstance(
        layer, RecombinedLinear | PackedLinear
    ):  # a Conv1D stands as an nn.Linear here, so that one is named
        return linear_spec(layer) if type(layer) is nn.Linear else None, layer.state_dict()
    spec = {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
    }
    tensors = {} if layer.bias is None else {"bias": layer.bias}
    if isinstance(layer, PackedLinear):
        weight = layer.part("weight")
        more = {"kind": "packed", "bits": weight.bits, "group": weight.group}
        return spec | more, tensors | {"codes": weight.codes, "scale": weight.scale}
    built = layer.built_up_to()
    if isinstance(layer, SharedBasisLinear):
        more = {"rank": layer.basis_rank, "chunk": layer.chunk, "gate": layer.gate, "placement": layer.placement}
        spec |= {"kind": "shared_basis", "built": built, **more, "basis": plan.share(layer.part("basis"))}
        mixer = layer.part("mixer")
        return spec | ({"packed": bits} if (bits := bits_of(mixer)) else {}), tensors | stored("mixer", mixer)
    shared = isinstance(layer, FactoredLinear) and identity(layer.part("right")) in common
    structured, dense, _ = layer.flops(1, train=False)
    small = dense < structured and not shared  # takes fewer bytes as one matrix
    if isinstance(layer, DeltaLinear) and (small or layer.is_packed) or small and not layer.is_packed:
        return spec | {"kind": "linear"}, tensors | {"weight": layer.dense_weight()}
    if isinstance(layer, DeltaLinear):  # no low-rank part, so it never builds more than its base
        spec |= {"kind": "factored", "built": 0, "rank": layer.in_features, "right": None}
        return spec, tensors | {"left.weight": layer._pretrained()}
    if isinstance(layer, FactoredLinear):
        right, (packed, own) = plan.share(layer.part("right")) if shared else "own", factors(layer, shared)
        spec |= {"kind": "factored", "built": built, "rank": layer.rank, "right": right}
        if layer.order is not None:
            spec, own = spec | {"pivot": True}, own | {"order": layer.order}
        return spec | ({"packed": packed} if packed else {}), tensors | own
    why = "a kind of layer that no exported folder knows; recombine.merge(model) makes it an ordinary one"
    raise UsageError(f"{name} is a {type(layer).__name__}, {why}")


def factors(layer: FactoredLinear, shared: bool) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """(bits and group by name of what is packed, the tensors) of a layer's factors.

    A core is folded into left, unless left is packed.

    Args:
        shared: right is no tensor of the layer.
    """
    left, tensors = layer.part("left"), {}
    parts = {"left": left} if bits_of(left) else {"left": layer._folded()}
    parts |= {} if shared else {"right": layer.part("right")}
    packed = {name: bits for name, part in parts.items() if (bits := bits_of(part))}
    if bits_of(left) and not layer.is_plain:
        inner = layer.inner()
        name = "core" if inner.ndim == 2 else "diagonal"
        packed, tensors = packed | {name: []}, {"core.weight" if inner.ndim == 2 else name: inner}
    for name, part in parts.items():
        tensors |= stored(name, part)
    return packed, tensors


def adapted(name: str, layer: nn.Module, plan: Plan, common: set[int]) -> tuple[dict, dict[str, Tensor]]:
    """The entry and tensors of a layer with an adapter of peft: a plain LoRA stays beside it, others are merged.

    Raises:
        UsageError: another adapter lies on a compressed layer, which would be as large as before.
    """
    base = layer.get_base_layer()
    active = list(layer.active_adapters)
    plain = hasattr(layer, "lora_A") and len(active) == 1 and active[0] in layer.lora_A
    plain = plain and not layer.lora_variant and not layer.lora_bias.get(active[0]) and not layer.merged
    if not plain:
        if isinstance(base, RecombinedLinear):
            kind = f"peft's {type(layer).__module__.split('.')[2]}"
            why = 'around a compressed layer, which a folder of kind "hf" cannot hold; export it as "dense"'
            raise UsageError(f"{name} has {kind} {why}")
        # a copy: merging writes into the layer, which stays as it is
        linear = merged(copy.deepcopy(layer))
        return linear_spec(linear), linear.state_dict()
    spec, tensors = planned_layer(name, base, plan, common)
    down, up = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
    sizes = {"in_features": down.shape[1], "out_features": up.shape[0], "rank": len(down)}
    scale = float(layer.scaling[active[0]])
    tensors = {f"base_layer.{key}": tensor for key, tensor in tensors.items()}
    return {"kind": "adapted", "base": spec, **sizes, "scale": scale}, tensors | {
        "down.weight": down,
        "up.weight": up,
    }
