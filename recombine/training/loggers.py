"""What can be watched while a run works: logger=wandb (Weights & Biases) or logger=tensorboard (a local page).

Both get the configuration when the run starts, every metric over the training step, and at the end the scores, what
the model costs, a table of its layers and a plot of their ranks. A kill loses nothing of TensorBoard's file and less
than `wandb_record.EVERY` rows of W&B's. A run that is taken up again keeps its id. Only the first rank writes.

A run may hold two fits, and both count their steps from 0: the metrics of the distillation begin with "distilled/".
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf

from recombine import results
from recombine.errors import UsageError
from recombine.runtime.environment import environment
from recombine.runtime.kinds import Positive, Project, Word
from recombine.training import distributed
from recombine.training.logged_values import images, layer_table, media, numbers
from recombine.training.wandb_record import INTERVAL, Rows, set_up

PATIENCE = 120  # seconds that the end of a run waits for its upload; `wandb sync` brings what is left


@dataclass(frozen=True, kw_only=True)
class LoggerSettings:
    """The keys of `logger`; all but the name are of wandb alone.

    name: none, wandb or tensorboard. project, entity, group, tags: where a run is filed at Weights & Biases.
    mode: online or offline; None: online where there is a key. timeout: seconds that the server may take to answer.
    """

    name: Literal["none", "wandb", "tensorboard"] = "none"
    project: Project = "recombine"
    entity: Word | None = None
    group: Word | None = None
    mode: Literal["online", "offline"] | None = None
    tags: tuple[Word, ...] = ()
    timeout: Positive = 10.0


@dataclass(frozen=True)
class Watched:
    """What a logger is told of its run.

    out: its folder. name, group: what it is called, and what it is one of. stage: the name of the stage.
    config: the configuration as plain values. labels: what runs are told apart by (method, model, task ...).
    """

    out: Path
    name: str
    group: str | None
    stage: str
    config: dict
    labels: dict[str, str]


@contextmanager
def open_logger(settings: LoggerSettings, run: Watched) -> Iterator["RunLogger | None"]:
    """Opens the logger of that name and closes it whatever happens. The name none gives None.

    Raises:
        UsageError: there is no such logger, or it refuses a key.
    """
    kinds = {"none": None, "wandb": WandB, "tensorboard": TensorBoard}
    if settings.name not in kinds:
        raise UsageError(f"logger.name={settings.name}: must be one of {', '.join(kinds)}")
    if kinds[settings.name] is None:
        yield None
        return
    logger = (kinds[settings.name] if distributed.rank() == 0 else RunLogger)(settings, run)
    failed = True
    try:
        yield logger
        failed = False
    finally:
        logger.close(failed)


class RunLogger(Logger):
    """The Lightning logger of all fits of a run. This class writes nothing: it serves all ranks but the first."""

    def __init__(self, settings: LoggerSettings, run: Watched):
        super().__init__()
        self.out, self.prefix = run.out, ""

    def fit(self, name: str) -> "RunLogger":
        """Itself, for the fit of that name: best (what the result is about) or distilled."""
        self.prefix = "" if name == "best" else f"{name}/"
        return self

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers at a step of the present fit."""

    def report(self, result: dict) -> None:
        """What a finished run has to show."""

    def close(self, failed: bool) -> None:
        """Writes out what is left."""

    def log_hyperparams(self, *_, **__) -> None:
        """They are written at the start."""

    @property
    def name(self) -> str:
        """The logger's name, for Lightning."""
        return type(self).__name__.lower()

    @property
    def version(self) -> str:
        """The run's id, for Lightning."""
        return run_id(self.out)

    @property
    def save_dir(self) -> str:
        """The run's folder, for Lightning."""
        return str(self.out)


class WandB(RunLogger):
    """Offline unless there is a key; offline as well where the server is out of reach."""

    def __init__(self, settings: LoggerSettings, run: Watched):
        super().__init__(settings, run)
        import wandb

        set_up()
        how = self.arguments(settings, run)
        why = "no key, so offline" if settings.mode is None else "offline"
        try:
            if (mode := chosen_mode(settings.mode, wandb)) == "online":
                self.experiment = wandb.init(mode="online", **how)
                print(f"W&B: {self.experiment.url}", file=sys.stderr)
        except wandb.errors.Error as error:
            said = (str(error).splitlines() or ["no reason given"])[0]
            why = f"{wandb.setup().settings.base_url} fails ({said}), so offline"
            mode = "offline"
            wandb.teardown()  # it would keep the id
        if mode == "offline":
            self.experiment = wandb.init(mode="offline", **how)
            print(f"W&B: {why}; upload: wandb sync '{self.experiment.settings.sync_dir}'", file=sys.stderr)
        self.experiment.define_metric("trainer/global_step")
        self.experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        self.rows = Rows(self.experiment)

    def arguments(self, settings: LoggerSettings, run: Watched) -> dict:
        """The arguments of wandb.init without its mode."""
        import wandb

        options = {"silent": True, "x_transaction_log_flush_interval": INTERVAL, "finish_timeout": PATIENCE}
        options |= {"init_timeout": settings.timeout, "disable_git": True}  # a remote's URL may hold a token
        return {
            "project": settings.project,
            "entity": settings.entity,
            "dir": str(run.out),
            "id": run_id(run.out),
            "resume": "allow",
            "name": run.name,
            "group": settings.group or run.group,
            "job_type": run.stage,
            "tags": [tag[:64] for tag in dict.fromkeys([*run.labels.values(), *settings.tags])],
            "config": run.config | {"labels": run.labels, "environment": environment()},
            "settings": wandb.Settings(**options),
        }

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        at = {} if step is None else {"trainer/global_step": step}
        self.rows.log({self.prefix + key: value for key, value in metrics.items()} | at)

    def report(self, result: dict) -> None:
        import wandb

        if shown := media(result, self.out, wandb.Table, wandb.Image):
            self.rows.log(shown)
        self.experiment.summary.update(numbers(result))

    def close(self, failed: bool) -> None:
        import wandb

        self.experiment.finish(exit_code=int(failed))
        wandb.teardown()  # finish() comes back before the record is whole; this waits


class TensorBoard(RunLogger):
    """Event files in the run's folder, so that the page names runs as their folders are named."""

    def __init__(self, settings: LoggerSettings, run: Watched):
        super().__init__(settings, run)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(f"logger=tensorboard: cannot be imported ({error}); pip install -e '.[watch]'") from error
        self.settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in results.flat(run.config).items()
        }
        self.experiment = SummaryWriter(str(run.out))
        text = OmegaConf.to_yaml(OmegaConf.create(run.config))
        self.experiment.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
        self.experiment.flush()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.experiment.add_scalar(self.prefix + key, value, step)
        self.experiment.flush()

    def report(self, result: dict) -> None:
        from torch.utils.tensorboard.summary import hparams

        values = numbers(result)
        for summary in hparams(self.settings, values):  # the page's table of runs
            self.experiment.file_writer.add_summary(summary)
        for key, value in values.items():
            self.experiment.add_scalar(key, value, 0)
        if result["layers"]:
            columns, rows = layer_table(result["layers"])
            lines = [columns, ["---"] * len(columns), *rows]
            self.experiment.add_text("layers", "\n".join("|".join(map(str, line)) for line in lines))
        for name, image in images(result, self.out).items():
            self.experiment.add_image(name, np.asarray(image), dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.experiment.close()


def chosen_mode(wanted: str | None, wandb) -> str:
    """How W&B runs, "online" or "offline": as asked for, or else online where the environment or a login has a key."""
    mode = wanted or os.environ.get("WANDB_MODE")
    if mode not in (None, "online", "offline"):
        raise UsageError(f"logger.mode={mode}: must be online, offline or null; logger=none logs nothing")
    if mode == "offline":
        return mode
    key = wandb.login(prompt=False, verify=False)
    if mode == "online" and not key:
        raise UsageError("logger.mode=online: there is no key; set WANDB_API_KEY, or run `wandb login` once")
    return "online" if key else "offline"


def run_id(out: Path) -> str:
    """The id of the run in that folder. A resumed run has the same id."""
    return hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
