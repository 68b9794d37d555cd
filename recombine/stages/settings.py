"""What a stage is told: its own keys, and those of `calibration`, `analyse` and `harness`. Plain values, no Hydra."""

from dataclasses import dataclass, field

from recombine.core.method import Method
from recombine.training.settings import DistillationSettings, OptimizerSettings, TrainerSettings


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """A stage by its name; `adapt` has no keys of its own."""

    name: str = "adapt"


@dataclass(frozen=True, kw_only=True)
class RetrofitSettings(StageSettings):
    """test: score the rewritten model on the test set. bits: of the rewritten layers' weights; None: as they are."""

    name: str = "retrofit"
    test: bool = False
    bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class CompressSettings(StageSettings):
    """Of `compress` and `joint`. distil: the training that follows the original model."""

    name: str = "compress"
    distil: DistillationSettings = field(default_factory=DistillationSettings)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(StageSettings):
    """checkpoint: a file; None: the original model. bits: of the target layers' weights; None: as they are."""

    name: str = "evaluate"
    checkpoint: str | None = None
    bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(StageSettings):
    """rewrite: False counts by the closed form alone. rounds: of the method and the reference in turns, 0 for none.

    reference: the method that it is timed beside. keep: inference keeps the weights that it built.
    """

    name: str = "profile"
    rewrite: bool = True
    rounds: int = 5
    reference: Method | None = None
    keep: bool = True


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """What methods that look at data see of the training set: so many samples, in batches of that size."""

    samples: int = 256
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """What is measured after the stage (recombine/stages/analysis.py).

    subspaces: share of the energy at which principal subspaces are compared; None: they are not.
    maps: ranks a side of the maps of that; None: no maps.
    """

    subspaces: float | None = None
    maps: int | None = None


@dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """lm-evaluation-harness. tasks: None takes those that go with the data. limit: documents a task."""

    tasks: tuple[str, ...] | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that the stages are told of one run. probe: fit the linear probe first and report it."""

    seed: int = 0
    stage: StageSettings = field(default_factory=StageSettings)
    optim: OptimizerSettings = field(default_factory=OptimizerSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    analyse: AnalysisSettings = field(default_factory=AnalysisSettings)
    harness: HarnessSettings = field(default_factory=HarnessSettings)
    probe: bool = True


STAGE_SETTINGS: dict[str, type[StageSettings]] = {
    "adapt": StageSettings,
    "compress": CompressSettings,
    "evaluate": EvaluateSettings,
    "joint": CompressSettings,
    "profile": ProfileSettings,
    "retrofit": RetrofitSettings,
}
