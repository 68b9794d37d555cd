"""`quantize` packs the frozen weights of a model's linear layers, each tensor by itself."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from recombine.core.checks import check_holds_none
from recombine.core.packing import BESIDE, MIX, Packing, linear_layers
from recombine.core.places import kept_around
from recombine.core.rewrite import Record
from recombine.core.rollback import unchanged_on_failure
from recombine.core.tied import declare_tied
from recombine.core.untouched import remember
from recombine.errors import UsageError
from recombine.layers import PackedLinear, RecombinedLinear
from recombine.layers.packed import PREFIX, Packed, entries
from recombine.models import rebuild
from recombine.models.wrappers import unwrapped
from recombine.runtime import progress
from recombine.runtime.mapped import release

SMALLEST = 8  # entries of a tensor that is packed


def quantize(model: nn.Module, bits: int | str = 4, group: int = 64) -> nn.Module:
    """Packs every frozen matrix of the linear layers to integers, in place; returns the model.

    These are the layers that a method rewrote, and all linear layers of the model's blocks: the base under an adapter,
    factors, cores, bases and mixers. What trains stays as it is, and so do vectors, embeddings, norms and the head.
    A forward unpacks one tensor at a time, and gradients pass through it to its input. Call it after `apply`, when
    nothing more is learnt of the weights. Tensors of less than 8 entries stay as they are. Of a model that no method
    rewrote all linear layers of the blocks are packed.

    Args:
        bits: 8 or 4 an integer; mix: those that `apply` chose for each layer, and 8 in others.
        group: consecutive entries that share a scale, a multiple of 8.

    Raises:
        UsageError: bits or group are none of these, no mix was chosen, a tensor has fewer entries than one group or a
            value that is not finite, or nothing is frozen.
    """
    wrapped, model = model, unwrapped(model)
    Packing(bits, group)  # refuses others
    check_holds_none(model)
    bits_of = chosen(model) if bits == MIX else lambda name: bits
    found = [(name, p) for name, p in frozen_matrices(model) if p.is_floating_point() and p.numel() >= SMALLEST]
    found = [(name, p) for name, p in found if bits_of(name) is not None]
    if not found and bits == MIX:  # all of them stay in float
        return wrapped
    if not found:
        done = any(isinstance(part, Packed) for part in model.modules())
        why = "is packed already" if done else "has a frozen weight; what trains stays in float"
        raise UsageError(f"quantize: {'every' if done else 'no'} linear layer of this model {why}")
    name, p = min(found, key=lambda pair: pair[1].numel())
    if p.numel() < group:
        fix = f"say quantize.group={p.numel() // 8 * 8} or less"
        raise UsageError(f"quantize.group={group}: {name} has {p.numel()} entries, less than one group; {fix}")
    record = getattr(model, "recombined", None) or plain_record(model)
    packed: dict[int, Packed] = {}  # layers that share a tensor go on sharing it
    with unchanged_on_failure(model), kept_around(model):
        for name, p in progress.of(found, "quantizing", "tensors"):
            if (key := id(p)) not in packed:
                packed[key] = new = Packed.of(p, bits_of(name), group)
                if not p.is_meta and not new.scale.isfinite().all():
                    raise UsageError(f"quantize: {name} has values that are not finite; restore the weights")
                release([p])
            put_packed(model, name, lambda _, key=key: packed[key])
        names = {name for name, _ in model.named_parameters()}
        record.untouched, record.trainable = record.untouched & names, record.trainable & names
        record.marks = {name: mark for name, mark in record.marks.items() if name in names}
        model.recombined = record
    declare_tied(model)
    return wrapped


def chosen(model: nn.Module) -> Callable[[str], int | None]:
    """The bits of a tensor by its name, of a model whose layers have bits of their own; None: it stays in float.

    Raises:
        UsageError: they have none.
    """
    if not (bits := getattr(getattr(model, "recombined", None), "bits", None)):
        why = 'apply a method with a budget of bytes and packing=Packing("mix")'
        raise UsageError(f"quantize.bits=mix: no bits were chosen for the layers of this model: {why}")
    return lambda name: next((found for owner, found in bits.items() if name.startswith(f"{owner}.")), BESIDE)


def plain_record(model: nn.Module) -> Record:
    """The record of a model that no method rewrote."""
    named = dict(model.named_parameters())
    frozen = {name for name, p in named.items() if not p.requires_grad}
    record = Record(
        total=sum(entries(model).values()),
        architecture=rebuild.architecture(model),
        frozen=frozen,
        untouched=set(frozen),
        trainable=named.keys() - frozen,
    )
    remember(model, record)
    return record


def frozen_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The frozen matrices of `linear_layers`, by all their names; those that train too, of a plain model."""
    plain = not hasattr(model, "recombined")
    for owner in linear_layers(model):
        layer = model.get_submodule(owner)
        if isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward:
            continue  # packed already, or a class that computes something else
        for name, p in layer._parameters.items():
            if p is not None and p.ndim > 1 and (plain or not p.requires_grad):
                yield f"{owner}.{name}", p


def put_packed(model: nn.Module, name: str, make: Callable[[Tensor], Packed]) -> None:
    """Puts a packed tensor in the place of a parameter, by its dotted name.

    Args:
        make: gives it for the parameter.

    Raises:
        UsageError: there is no such parameter of a linear layer, or it has another shape.
    """
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    if (p := getattr(layer, "_parameters", {}).get(leaf)) is None or not isinstance(
        layer, nn.Linear | RecombinedLinear
    ):
        raise UsageError(f"{name} is no weight of a linear layer in this model")
    new = make(p)
    if new.shape != tuple(p.shape):
        raise UsageError(f"{name} is {new.shape} in the file and {tuple(p.shape)} in this model")
    if isinstance(layer, nn.Linear):
        model.set_submodule(owner, PackedLinear(layer, new).train(layer.training))
    else:
        layer.hold(leaf, new)
    layer.train(layer.training)  # drops what it built


def put_empty(model: nn.Module, specs: Mapping[str, dict], shared: Mapping[str, str]) -> None:
    """Puts packed tensors with any values into the places of a model's parameters.

    Args:
        specs: what each says of itself, by the parameter's name.
        shared: name of the first place of a tensor, by the names of its further places.

    Raises:
        UsageError: there is no such parameter, or it has another shape.
    """
    new: dict[str, Packed] = {}  # those that share their codes are one
    for name, spec in specs.items():
        owner, _, leaf = name.rpartition(".")
        codes = f"{owner}.{PREFIX}{leaf}.codes"
        first = shared.get(codes, codes)
        put_packed(model, name, lambda p, first=first, spec=spec: new.setdefault(first, Packed.empty(p, **spec)))
