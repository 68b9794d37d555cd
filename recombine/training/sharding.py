"""Training in shards (torch's FSDP2): every rank holds a part of each weight, gradient and moment.

`shard` works on any model that recombine rewrote. `Sharded` is the strategy that trainer=fsdp hands to Lightning.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from recombine.errors import UsageError
from recombine.layers.packed import packed_in
from recombine.models import roles

SHARDED = ("adamw", "adam", "sgd")  # optimizers that go entry by entry
PACKED = "packed weights are not divided among ranks; set trainer=ddp"


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2. While it fits, the model lies in shards; it tests whole models.

    A training state holds whole tensors, as that of one device does, and each can be taken up by the other.
    """

    def __init__(self):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Joins the group of ranks. All of them share the weights."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self.lightning_module is None:  # the group comes before the model
            self.connect(L.LightningModule())
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning calls `load_optimizer_state_dict`."""
        return True

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Makes the optimizer of the shards.

        Raises:
            UsageError: it needs whole matrices, or its state cannot be put together again.
        """
        require_entrywise(self.lightning_module.optim.name, self.lightning_module.key)
        super().setup_optimizers(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors of what trains, and the rest of the state as it is. Every rank has to call it."""
        module = self.lightning_module
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        state = {name: value for name, value in module.state_dict().items() if name not in frozen}
        return gathered(state)

    def optimizer_state(self, optimizer) -> dict[str, Any]:
        """The optimizer's state in whole tensors. Every rank has to call it."""
        state = getattr(optimizer, "optimizer", optimizer).state_dict()
        return state | {"state": {key: gathered(values) for key, values in state["state"].items()}}

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a training state."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Puts each rank's part of the whole tensors into the model."""
        module = self.lightning_module
        parts = {name: like(value, module.get_parameter(name)) for name, value in of_parameters(checkpoint, module)}
        module.load_state_dict(checkpoint["state_dict"] | parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Puts each rank's part of the whole tensors into the optimizers."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {
                key: {name: like(value, parameters[key]) for name, value in values.items()}
                for key, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": parts})


def asked(strategy: str | Mapping[str, Any]) -> bool:
    """Whether trainer.strategy is the one of shards."""
    return not isinstance(strategy, str) and strategy.get("_target_") == f"{__name__}.{Sharded.__name__}"


def require_entrywise(name: str, key: str) -> None:
    """Refuses an optimizer that shards cannot have. key: of its node.

    Raises:
        UsageError: names those that they can.
    """
    if name not in SHARDED:
        raise UsageError(f"{key}.name={name}: not with trainer=fsdp; choose one of {', '.join(SHARDED)}")


def of_parameters(checkpoint: Mapping[str, Any], module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a training state that are parameters of the module."""
    names = {name for name, _ in module.named_parameters()}
    return ((name, value) for name, value in checkpoint["state_dict"].items() if name in names)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divides the weights of a model among the ranks of a mesh, in place, block by block.

    Blocks that share a weight make one unit, since each unit gathers what it needs by itself. A block that shares one
    with what is outside the blocks is left to the rest of the model, which is a unit too. Frozen and trained weights
    may stand in one unit.

    Raises:
        UsageError: a weight without a dimension trains, or weights are packed; FSDP2 cannot divide these.
    """
    if packed_in(model):
        raise UsageError(f"quantize.bits: {PACKED}")
    scalars = {p for p in model.parameters() if p.ndim == 0}
    if name := next((name for name, p in model.named_parameters() if p in scalars and p.requires_grad), None):
        raise UsageError(f"trainer.strategy: {name} is one number, which cannot be sharded; set trainer=ddp")
    for unit in units(model):
        fully_shard(unit, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars)


def units(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks in units: those that share a parameter stand together; those that share one with the rest nowhere."""
    blocks = roles.blocks(model)
    inside = [{id(p) for p in block.parameters()} for block in blocks]
    names = roles.block_names(model)
    outside = {
        id(p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if not name.startswith(tuple(f"{block}." for block in names))
    }
    found: list[tuple[list[nn.Module], set[int]]] = []
    for block, mine in zip(blocks, inside, strict=True):
        joined = [unit for unit in found if unit[1] & mine]
        found = [unit for unit in found if unit not in joined]
        found.append(([b for unit in joined for b in unit[0]] + [block], mine.union(*(unit[1] for unit in joined))))
    return [members for members, parameters in found if not parameters & outside]


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors of what trains, on the CPU. Every rank has to call it.

    Raises:
        UsageError: the ranks' shards of a tensor are not all of it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward in eval mode the outermost unit is still whole, in memory that is freed
    return gathered({name: p for name, p in model.named_parameters() if p.requires_grad})


def gathered(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same with whole tensors on the CPU in the place of shards. Every rank has to call it.

    Raises:
        UsageError: the ranks' shards of a tensor are not all of it.
    """
    shards = {name: value for name, value in tensors.items() if isinstance(value, DTensor)}
    refuse_missing(shards)
    return {name: value.full_tensor().detach().cpu() if name in shards else value for name, value in tensors.items()}


def refuse_missing(shards: Mapping[str, DTensor]) -> None:
    """Refuses tensors of which the ranks together do not hold all. Every rank has to call it.

    Raises:
        UsageError: names the first.
    """
    if not shards:
        return
    device = next(iter(shards.values())).to_local().device
    held = torch.tensor([value.to_local().numel() for value in shards.values()], device=device)
    dist.all_reduce(held)
    for (name, value), count in zip(shards.items(), held.tolist(), strict=True):
        if count != value.numel():
            what = f"{count} of its {value.numel()} entries"
            raise UsageError(f"{name}: the ranks hold {what}, so a shard is missing and nothing is saved; start again")


def like(value: Any, parameter: Tensor) -> Any:
    """This rank's part of a whole tensor, where the parameter lies in shards and has its shape."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, or all of it where it does not lie in shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Any) -> Any:
    """All of a tensor that lies in shards. Every rank has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
