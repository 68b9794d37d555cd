"""What a model costs: parameters, bytes and FLOPs, counted on the model as it stands or predicted in closed form."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from recombine.core.method import Method, Site
from recombine.layers.packed import Packed, entries
from recombine.models import roles
from recombine.models.wrappers import unwrapped

ORDER = 4  # bytes of a place in an order of inputs (`FactoredLinear.order`)
ADAM = 8  # bytes of AdamW state for each trained weight: two float32 moments
MIB = 2**20


@dataclass(frozen=True)
class Account:
    """What a model costs. A parameter that several layers share is counted once, a packed one by its entries.

    stored, trained: parameters of the whole model, all of them and those that train.
    stored_without_head, trained_without_head: the same without the classification head.
    retained: weights that the target layers hold, as a share of the dense ones they had.
    retained_total: the same share of the whole model.
    bytes_weights: bytes of the weights, in memory and in a file that holds all of the model. Packed ones are integers
        and scales there; those that `stage.bits` rounded count as the integers they would be stored as. The orders of
        pivot layers are among them, the places of SVFT's and RoSA's sparse entries and MoDeGPT's turns are not.
    bytes_gradients: bytes of the gradients of what trains.
    bytes_optimizer: bytes of AdamW's two float32 moments. Every run is counted like this, whatever its optimizer, so
        that methods can be compared.
    flops: floating-point operations of one forward of one sample, 2 per multiplication; None if not measured.
    """

    stored: int
    trained: int
    stored_without_head: int
    trained_without_head: int
    retained: float
    retained_total: float
    bytes_weights: int
    bytes_gradients: int
    bytes_optimizer: int
    flops: int | None = None

    @property
    def memory_mib(self) -> float:
        """Weights + gradients + optimizer in MiB, as CERSA Table 14 counts (float32, AdamW)."""
        return (self.bytes_weights + self.bytes_gradients + self.bytes_optimizer) / MIB

    def as_dict(self) -> dict:
        """The fields and `memory_mib`, as result.json holds them."""
        return asdict(self) | {"memory_mib": self.memory_mib}


def count(model: nn.Module, sample: torch.Tensor | dict | None = None) -> Account:
    """The account of a model as it stands.

    Args:
        sample: one input (1, ...), or keyword arguments of the model by name; with it FLOPs are measured too.
    """
    model = unwrapped(model)
    parameters = dict(model.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    head = list(h.parameters()) if (h := roles.head(model)) is not None else []
    stored = sum(entries(model).values())
    record = getattr(model, "recombined", None)
    in_targets = stored_in_targets(model) if record else 0
    return Account(
        stored=stored,
        trained=sum(p.numel() for p in trained),
        stored_without_head=stored - sum(p.numel() for p in head),
        trained_without_head=sum(p.numel() for p in trained) - sum(p.numel() for p in head if p.requires_grad),
        retained=in_targets / record.dense if record and record.dense else 1.0,
        retained_total=stored / record.total if record else 1.0,
        bytes_weights=bytes_of(model),
        bytes_gradients=sum(p.numel() * p.element_size() for p in trained),
        bytes_optimizer=sum(p.numel() * ADAM for p in trained),
        flops=None if sample is None else flops(model, sample),
    )


def bytes_of(model: nn.Module) -> int:
    """Bytes of the weights of a model or a layer, as in `Account.bytes_weights`."""
    weights = sum(getattr(p, "stored_bytes", p.numel() * p.element_size()) for p in model.parameters())
    orders = [order for module in model.modules() if (order := getattr(module, "order", None)) is not None]
    return weights + sum(order.nbytes for order in orders)


def predict(method: Method, model: nn.Module, sites: list[Site]) -> Account:
    """The account that `count` would give after the rewriting, from the method's closed form. Nothing is built.

    FLOPs are not predicted.
    """
    (stored, trained), size = method.sizes(sites), sites[0].module.weight.element_size()
    dense, total = sum(site.module.weight.numel() for site in sites), sum(p.numel() for p in model.parameters())
    head = head_size(model)
    rest = total - held(site.module for site in sites)
    return Account(
        stored=rest + stored,
        trained=trained + head,
        stored_without_head=rest + stored - head,
        trained_without_head=trained,
        retained=stored / dense,
        retained_total=(rest + stored) / total,
        bytes_weights=size * (rest + stored) + orders(method, sites),
        bytes_gradients=size * (trained + head),
        bytes_optimizer=ADAM * (trained + head),
    )


def orders(method: Method, sites: list[Site]) -> int:
    """Bytes of the orders of inputs that pivot layers hold beside their weights, where all of them become such."""
    pivot = getattr(method, "factor", None) == "pivot"
    return ORDER * sum(site.module.weight.shape[1] for site in sites) if pivot else 0


def head_size(model: nn.Module) -> int:
    """Parameters of the classification head; 0 where there is none."""
    return 0 if (head := roles.head(model)) is None else sum(p.numel() for p in head.parameters())


def stored_in_targets(model: nn.Module) -> int:
    """Weights inside the rewritten layers, as `held` counts them."""
    return held(model.get_submodule(target) for target in model.recombined.targets)


def held(layers: Iterable[nn.Module]) -> int:
    """Weights inside these layers. Biases are left out, and a shared basis is counted once."""
    weights: dict[int, int] = {}
    for layer in layers:
        sizes = entries(layer)
        weights |= {id(p): sizes[id(p)] for name, p in layer.named_parameters() if not name.endswith("bias")}
    return sum(weights.values())


def flops(model: nn.Module, sample: torch.Tensor | dict) -> int:
    """FLOPs of one forward in eval mode, counted by torch on what really runs; the model keeps its mode.

    Args:
        sample: as in `count`.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    model.eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the counter knows no fused attention on a CPU
        run = partial(model, **sample) if isinstance(sample, dict) else partial(model, sample)
        run()  # builds what eval keeps
        with FlopCounterMode(display=False) as counter:
            run()
    model.train(training)
    return counter.get_total_flops()


def layer_report(model: nn.Module) -> list[dict]:
    """One row for each rewritten layer: name, role, shape (out, in), kind, ranks, bits where it is packed, and `held`.

    `held` is the share of the dense layer's weights that this one stores. A shared basis is divided among its layers.
    """
    layers = {name: model.get_submodule(name) for name in model.recombined.targets}
    users = Counter(id(p) for layer in layers.values() for p in layer.parameters())
    rows = []
    for name, layer in layers.items():
        spec = layer.spec() if hasattr(layer, "spec") else {}
        m = getattr(layer, "out_features", None) or len(layer.weight)  # a convolution or a norm, which only trains
        n = getattr(layer, "in_features", None) or layer.weight.numel() // m
        weights, sizes = [p for key, p in layer.named_parameters() if not key.endswith("bias")], entries(layer)
        held = sum(sizes[id(p)] / users[id(p)] for p in weights) / (m * n)
        if isinstance(spec.get("core"), bool):  # of a low-rank delta
            spec["core"] = [spec["rank"]] * 2 if spec["core"] else None
        ranks = {
            k: v for k, v in spec.items() if k in ("rank", "core", "tail", "basis_rank", "chunk") and v is not None
        }
        row = {"name": name, "role": model.recombined.targets[name], "shape": [m, n], "kind": type(layer).__name__}
        bits = next(({"bits": part.bits} for part in layer.modules() if isinstance(part, Packed)), {})
        rows.append(row | ranks | bits | {"held": held})
    return rows
