"""The settings of a run, as typed plain values: the keys of `stage`, `calibration`, `analyse`, `harness`, `sample`.

`runner/config.py` makes them from the configuration; stages read them.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from recombine.core.method import Method
from recombine.runtime.kinds import BatchSize, Bits, Bytes, Count, Group, Name, Place, PositiveShare, Seed, Weight, Word
from recombine.training.settings import DistillationSettings, TaskSettings, TrainerSettings


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """The keys that every stage has: its name. `adapt` has no others."""

    name: str = "adapt"


@dataclass(frozen=True, kw_only=True)
class RetrofitSettings(StageSettings):
    """The keys of `retrofit`.

    test: score the rewritten model on the test set. bits: quantize the rewritten layers' weights to so many; None: no.
    """

    name: str = "retrofit"
    test: bool = False
    bits: Bits | None = None


@dataclass(frozen=True, kw_only=True)
class CompressSettings(StageSettings):
    """The keys of `compress`. distil: the training that follows the original model."""

    name: str = "compress"
    distil: DistillationSettings = field(default_factory=DistillationSettings)


@dataclass(frozen=True, kw_only=True)
class JointSettings(CompressSettings):
    """The keys of `joint`. order: of compressor and adapter; adapt_first merges before it compresses."""

    name: str = "joint"
    order: Literal["compress_first", "adapt_first"] = "compress_first"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(StageSettings):
    """The keys of `evaluate`.

    checkpoint: a file; None: the original model. bits: quantize the target layers' weights to so many; None: no.
    """

    name: str = "evaluate"
    checkpoint: Place | None = None
    bits: Bits | None = None


@dataclass(frozen=True, kw_only=True)
class SampleSettings(StageSettings):
    """The keys of the stage `sample`. checkpoint: a file; None: the original model."""

    name: str = "sample"
    checkpoint: Place | None = None


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(StageSettings):
    """The keys of `profile`.

    rewrite: False counts by the closed form alone. rounds: how often the method and the reference are timed; 0: never.
    reference: the method that it is timed beside. keep: inference keeps the dense weights that it builds once.
    """

    name: str = "profile"
    rewrite: bool = True
    rounds: Annotated[int, Field(ge=0, le=10_000)] = 5
    reference: Method | None = None
    keep: bool = True

    def contradiction(self, key: str) -> str | None:
        """Why the values do not go together; None: they do. key: of the node."""
        if self.rewrite and self.rounds and self.reference is None:
            fix = f"say {key}.reference.name=lora, or {key}.rounds=0"
            return f"{key}.reference=null: nothing is timed without one; {fix}"
        return None


@dataclass(frozen=True, kw_only=True)
class PlanSettings(StageSettings):
    """The keys of `stage=plan`, which plans the run's stage and runs nothing.

    device: whose memory and speed count: here, or a name of runner/plan_devices.py.
    """

    name: str = "plan"
    device: Name = "here"


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How much of the training set calibration sees: so many samples, in batches of that size.

    memory: what the statistics and the factors may take at once. sha256: of the tokens that a language model must
    calibrate on; None: any.
    """

    samples: Count = 256
    batch_size: BatchSize = 32
    memory: Bytes = "auto"
    sha256: Word | None = None


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """What is measured after the stage (recombine/stages/analysis.py).

    subspaces: share of the energy at which principal subspaces are compared; None: they are not.
    maps: ranks a side of the maps of that; None: no maps.
    """

    subspaces: PositiveShare | None = None
    maps: Annotated[int, Field(ge=1, le=1024)] | None = None


@dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """The keys of lm-evaluation-harness, which scores language models.

    tasks: for example ("gsm8k_metamath",); (): none; None: those that go with the data. limit: documents a task; None:
    all.
    """

    tasks: tuple[str, ...] | None = None
    limit: Count | None = None

    def names(self, of_data: tuple[str, ...]) -> tuple[str, ...]:
        """The tasks, where those are of_data that go with the data."""
        return of_data if self.tasks is None else self.tasks


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """How the frozen weights of linear layers are packed, once they are frozen for good.

    bits: of an integer; auto: those of none, 8, 4 and their mix that come closest to the model under a budget of bytes;
        None: not.
    group: consecutive entries that share a scale.
    """

    bits: Literal[8, 4, "auto"] | None = None
    group: Group = 64


@dataclass(frozen=True, kw_only=True)
class DrawingSettings:
    """What a model that draws is asked for when it is tested.

    prompts: a list; None: those of the data. seeds: of the noise of each prompt's pictures; (): nothing is drawn.
    steps, guidance, scheduler: see `recombine.models.drawing`. clip: see `recombine.evaluation.pictures`.
    """

    prompts: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    seeds: tuple[Seed, ...] = (0, 1, 2, 3)
    steps: Annotated[int, Field(ge=1, le=1000)] = 30
    guidance: Weight = 3.0
    scheduler: Literal["ddim", "dpm", "euler"] = "ddim"
    clip: Name | None = None


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of one run. probe: fit the linear probe first and report it."""

    seed: Seed = 0
    stage: StageSettings = field(default_factory=StageSettings)
    optim: TaskSettings = field(default_factory=TaskSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    analyse: AnalysisSettings = field(default_factory=AnalysisSettings)
    harness: HarnessSettings = field(default_factory=HarnessSettings)
    quantize: QuantizeSettings = field(default_factory=QuantizeSettings)
    sample: DrawingSettings = field(default_factory=DrawingSettings)
    probe: bool = True


STAGE_SETTINGS: dict[str, type[StageSettings]] = {  # of the stages that have keys of their own
    "compress": CompressSettings,
    "evaluate": EvaluateSettings,
    "joint": JointSettings,
    "plan": PlanSettings,
    "profile": ProfileSettings,
    "retrofit": RetrofitSettings,
    "sample": SampleSettings,
}
