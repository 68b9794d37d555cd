"""How a run trains: the keys `optim` and `trainer` of the configuration, and `stage.distil`."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field

from recombine.runtime.kinds import Count, Epochs, Name, Positive, Rate, Share, Weight, Whole

Machines = Annotated[int, Field(ge=1, le=4096)]
Minutes = Annotated[float, Field(ge=0, le=10_000)]
INSTALL = "pip install -e '.[8bit]', or say optim=adamw"
Ratio = Annotated[float, Field(ge=1e-3, le=1e3)]
LabelSmoothing = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """One training's optimizer and schedule.

    name: adamw, adam, sgd (with a momentum of 0.9), adamw_8bit (by torchao), or muon (AdamW for what is no matrix).
    lr: peak learning rate of the method's weights; None: the method's own.
    relative: lr is relative to the norm of each layer's weight, whatever its factors are (`rates`);
        what is no factor of a layer has the method's own rate.
    lr_ratio: the rate of every B of the pairs B A that train, over lr (LoRA+: 16).
    lr_head: peak learning rate of the classification head.
    weight_decay: on matrices only.
    warmup: share of the steps over which the rates rise linearly from 0.
    schedule: cosine or linear, down to 0; or constant.
    clip: largest norm of the gradient; None: no limit.
    """

    name: Literal["adamw", "adam", "sgd", "adamw_8bit", "muon"] = "adamw"
    lr: Rate | None = None
    relative: bool = False
    lr_ratio: Ratio = 1.0
    lr_head: Rate = 5e-3
    weight_decay: Rate = 0.0
    warmup: Share = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: Positive | None = 1.0

    def contradiction(self, key: str) -> str | None:
        """Why the values do not go together; None: they do. key: of the node."""
        if self.name == "adamw_8bit" and find_spec("torchao") is None:
            return f"{key}.name=adamw_8bit: torchao is not installed; {INSTALL}"
        if self.relative and self.lr_ratio != 1:
            return f"{key}.lr_ratio={self.lr_ratio:g}: {key}.relative=true gives every factor its own rate; drop one"
        if self.relative and self.name == "sgd":
            return f"{key}.relative=true: a step of sgd is as large as the gradient; say {key}.name=adamw, or drop it"
        return None


@dataclass(frozen=True, kw_only=True)
class TaskSettings(OptimizerSettings):
    """The training on the task.

    label_smoothing: of the cross-entropy, in training.
    head: where the classification head starts: random, or probe (the linear probe on the same data).
    """

    label_smoothing: LabelSmoothing = 0.0
    head: Literal["random", "probe"] = "random"


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(OptimizerSettings):
    """The training that follows the original model (CRISP Alg. 4).

    epochs: 0 for none. kl, mse, features, l1: the weights of its losses, as `distillation.Distillation` has them.
    """

    epochs: Annotated[int, Field(ge=0, le=100_000)] = 4
    kl: Weight = 1.0
    mse: Weight = 1.0
    features: Weight = 1.0
    l1: Weight = 0.0

    def contradiction(self, key: str) -> str | None:
        """Why the values do not go together; None: they do. key: of the node."""
        if self.epochs and not (self.kl or self.mse or self.features or self.l1):
            none = " ".join(f"{key}.{name}=0" for name in ("kl", "mse", "features", "l1"))
            return f"{none}: nothing is left to learn; set one, or {key}.epochs=0"
        return super().contradiction(key)


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Where and how long it trains.

    accelerator, devices, num_nodes: as Lightning's Trainer takes them.
    strategy: a name that Lightning knows, or a mapping with `_target_` and its arguments.
    precision: auto, 32-true, bf16-mixed or 16-mixed.
    epochs: of the training on the task.
    patience: epochs without a better validation before it stops; None: never.
    checkpoint_minutes: longest time between two training states.
    accumulate: batches whose gradients make one step, as one batch of that many times the size would.
    compile: torch.compile of the blocks in training: True, or the name of one of torch's backends.
    gradient_checkpointing: the backward pass computes each block again; only its input is kept.
    matmul: how exact products of float32 matrices are, as torch.set_float32_matmul_precision has it.
    progress: show bars and lines while it works.
    """

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: Machines | Literal["auto"] | list[Whole] = 1
    num_nodes: Machines = 1
    strategy: str | Mapping[str, Any] = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    epochs: Epochs = 4
    patience: Count | None = None
    checkpoint_minutes: Minutes = 5
    accumulate: Count = 1
    compile: bool | Name = False
    gradient_checkpointing: bool = False
    matmul: Literal["highest", "high", "medium"] = "highest"
    progress: bool = True
