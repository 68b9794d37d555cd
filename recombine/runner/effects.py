"""Keys that the user typed and that the run does not read: refused where the run would mislead, else said in a line.

What a stage does not read stands in one table. This imports no torch.
"""

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hydra.conf import HydraConf
from hydra.types import RunMode

from recombine.errors import UsageError

TRAINING = tuple(
    f"trainer.{key}"
    for key in ("epochs", "patience", "checkpoint_minutes", "accumulate", "compile", "gradient_checkpointing")
)
OPTIM = tuple(
    f"optim.{key}"
    for key in ("name", "lr", "lr_ratio", "relative", "lr_head", "weight_decay", "warmup", "schedule", "clip")
)
NO_TRAINING = (*TRAINING, *OPTIM, "optim.label_smoothing", "probe")  # optim.head=probe starts the head of any stage
UNREAD: dict[str, tuple[str, ...]] = {  # stage -> keys and nodes that it does not read
    "adapt": (),
    "compress": ("optim.lr", "optim.lr_ratio", "optim.relative"),  # the classifier alone trains, at optim.lr_head
    "joint": (),
    "retrofit": NO_TRAINING,
    "profile": (*NO_TRAINING, "trainer.matmul", "harness"),
    "sample": (*NO_TRAINING, "harness", "optim", "calibration", "data@calibration.data", "method", "compressor"),
    "evaluate": (*NO_TRAINING, "optim", "calibration", "data@calibration.data", "method", "compressor"),
}
ONE_RUN = ("only", "retry", "hydra.launcher", "hydra.sweeper", "hydra.sweep", "hydra/launcher", "hydra/sweeper")


def refuse_misleading(cfg: Mapping[str, Any], hydra: HydraConf) -> None:
    """Refuses what would have the user read more into the result than is in it.

    Args:
        cfg: the composed configuration.
        hydra: what Hydra knows of the call.

    Raises:
        UsageError: `evaluate` with a compressor or a budget, or `only` without a grid.
    """
    given = by_key(hydra.overrides.task)
    if (stage := cfg["stage"].get("name")) in ("evaluate", "sample"):
        asked = {"method@compressor": cfg.get("compressor") is not None, "budget": cfg["budget"] != "none"}
        if lost := [given[key] for key, holds in asked.items() if key in given and holds]:
            why = f"stage={stage} scores a checkpoint, or the original model, as it is, and compresses nothing"
            raise UsageError(f"{lost[0]}: {why}; drop it, or say stage=joint")
    if "only" in given and cfg["only"] is not None and not cfg["grid"]:
        raise UsageError(
            f"{given['only']}: chooses cells of a grid, and there is none; drop it, or say experiment=NAME"
        )


def say_unread(config: Mapping[str, Any], hydra: HydraConf, idle: Collection[str] = ()) -> None:
    """Says on stderr which of the typed keys have no effect. Call it once the configuration is known to be good.

    Args:
        config: the configuration as plain values.
        hydra: what Hydra knows of the call.
        idle: keys and nodes that have none beside the others of the run.
    """
    stage = config["stage"]
    single = hydra.mode is RunMode.RUN
    unread = set(UNREAD.get(stage["name"], ())) | (set(ONE_RUN) if single else set())
    if stage.get("rewrite") is False:
        unread |= {"stage.rounds", "stage.reference", "stage.keep"}
    elif stage.get("rounds") == 0:
        unread |= {"stage.reference", "stage.keep"}
    if stage.get("test") is False:
        unread |= {"harness"}
    if stage["name"] == "evaluate" and stage["bits"]:
        unread -= {"method"}  # whose targets are quantized
    unread |= set(idle)
    given = by_key([*hydra.overrides.task, *hydra.overrides.hydra])
    if lost := [override for key, override in given.items() if any(is_in(key, node) for node in unread)]:
        run = f"stage={stage['name']}{', no sweep' if single else ''}"
        print(f"note: not read in this run ({run}): {' '.join(lost)}", file=sys.stderr, flush=True)


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """The overrides of a command line by what they set."""
    return {override.split("=")[0].lstrip("+~"): override for override in overrides}


def is_in(key: str, node: str) -> bool:
    """Whether a key is this node or one of its keys."""
    return key == node or key.startswith((f"{node}.", f"{node}@"))
