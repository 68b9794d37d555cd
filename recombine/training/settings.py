"""How a run trains: the keys `optim` and `trainer` of the configuration, and `stage.distil`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """One training's optimizer and schedule.

    name: adamw, adam or sgd (with a momentum of 0.9).
    lr: peak learning rate of the method's weights; None: the method's own.
    lr_head: peak learning rate of the classification head.
    weight_decay: on matrices only.
    warmup: share of the steps over which the rates rise linearly from 0.
    schedule: cosine or linear, down to 0; or constant.
    clip: largest norm of the gradient; None: no limit.
    label_smoothing: of the cross-entropy, in training.
    head: where the classification head starts: random, or probe (the linear probe on the same data).
    """

    name: str = "adamw"
    lr: float | None = None
    lr_head: float = 5e-3
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: str = "cosine"
    clip: float | None = 1.0
    label_smoothing: float = 0.0
    head: str = "random"


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(OptimizerSettings):
    """The training that follows the original model (CRISP Alg. 4).

    epochs: 0 for none. kl, mse, features, l1: the weights of its losses, as `objectives.Distillation` has them.
    """

    epochs: int = 4
    kl: float = 1.0
    mse: float = 1.0
    features: float = 1.0
    l1: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Where and how long it trains.

    accelerator, devices, num_nodes: as Lightning's Trainer takes them.
    strategy: a name that Lightning knows, or a mapping with `_target_` and its arguments.
    precision: auto, 32-true, bf16-mixed or 16-mixed.
    epochs: of the training on the task.
    patience: epochs without a better validation before it stops; None: never.
    checkpoint_minutes: longest time between two training states.
    progress: show bars and lines while it works.
    """

    accelerator: str = "auto"
    devices: int | str | list[int] = 1
    num_nodes: int = 1
    strategy: str | Mapping[str, Any] = "auto"
    precision: str = "auto"
    epochs: int = 4
    patience: int | None = None
    checkpoint_minutes: float = 5
    progress: bool = True
