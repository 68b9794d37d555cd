"""What can be watched while a run works: logger=wandb (Weights & Biases) or logger=tensorboard (a local page).

Both get the configuration when the run starts, every metric over the training step, and at the end the scores, what
the model costs, a table of its layers and a plot of their ranks. Of a run that is killed at most a second is lost. A
run that is taken up again goes on under the same id. Only the first rank writes.

A run may hold two fits, and both count their steps from 0: the metrics of the distillation begin with "distilled/".
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf
from PIL import Image

from recombine import results
from recombine.errors import UsageError
from recombine.stages.context import Run
from recombine.training import distributed

PATIENCE = 120  # seconds that the end of a run waits for its upload; `wandb sync` brings what is left


@contextmanager
def watching(run: Run) -> Iterator[None]:
    """Opens the logger that the configuration names, as `run.logger`, and closes it whatever happens."""
    kinds = {"none": None, "wandb": WandB, "tensorboard": TensorBoard}
    if (name := run.cfg.logger.name) not in kinds:
        raise UsageError(f"logger.name={name}: must be one of {', '.join(kinds)}")
    if kinds[name] is None:
        yield
        return
    run.logger = (kinds[name] if distributed.rank() == 0 else Watch)(run)
    failed = True
    try:
        yield
        failed = False
    finally:
        run.logger.close(failed)


class Watch(Logger):
    """The Lightning logger that all fits of a run share; as it stands here, for the other ranks, it writes nothing."""

    def __init__(self, run: Run):
        super().__init__()
        self.out, self.prefix = run.out, ""

    def fit(self, name: str) -> "Watch":
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
        return type(self).__name__.lower()

    @property
    def version(self) -> str:
        return run_id(self.out)

    @property
    def save_dir(self) -> str:
        return str(self.out)


class WandB(Watch):
    """Offline unless there is a key; offline as well where the server is out of reach."""

    def __init__(self, run: Run):
        super().__init__(run)
        import wandb

        knobs, tags = run.cfg.logger, labels(run)
        if not isinstance(knobs.timeout, int | float) or knobs.timeout <= 0:
            raise UsageError(f"logger.timeout={knobs.timeout}: must be a number of seconds, more than 0")
        settings = {"silent": True, "x_transaction_log_flush_interval": 1, "finish_timeout": PATIENCE}
        settings |= {"init_timeout": knobs.timeout, "disable_git": True}  # a remote's URL may hold a token
        wandb.setup(wandb.Settings(silent=True))
        how = {
            "project": knobs.project,
            "entity": knobs.entity,
            "dir": str(run.out),
            "id": run_id(run.out),
            "resume": "allow",
            "name": run_label(run.out),
            "group": knobs.group or sweep(run.out),
            "job_type": run.cfg.stage.name,
            "tags": [tag[:64] for tag in dict.fromkeys([*tags.values(), *knobs.tags])],
            "config": results.settings(run.cfg) | {"labels": tags, "environment": results.environment()},
            "settings": wandb.Settings(**settings),
        }
        why = "no key, so offline" if knobs.mode is None else "offline"
        try:
            if (mode := chosen_mode(knobs.mode, wandb)) == "online":
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

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        at = {} if step is None else {"trainer/global_step": step}
        self.experiment.log({self.prefix + key: value for key, value in metrics.items()} | at)

    def report(self, result: dict) -> None:
        import wandb

        if result["layers"]:
            columns, rows = layer_table(result["layers"])
            table, plot = wandb.Table(columns=columns, data=rows), wandb.Image(rank_plot(result["layers"]))
            self.experiment.log({"layers": table, "ranks": plot})
        self.experiment.summary.update(numbers(result))

    def close(self, failed: bool) -> None:
        import wandb

        self.experiment.finish(exit_code=int(failed))
        wandb.teardown()  # finish() comes back before the record is whole; this waits


class TensorBoard(Watch):
    """Event files in the run's folder, so that the page names runs as their folders are named."""

    def __init__(self, run: Run):
        super().__init__(run)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(f"logger=tensorboard: cannot be imported ({error}); pip install -e '.[watch]'") from error
        self.settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in results.flat(results.settings(run.cfg)).items()
        }
        self.experiment = SummaryWriter(str(run.out), flush_secs=1)
        text = OmegaConf.to_yaml(OmegaConf.create(results.settings(run.cfg)))
        self.experiment.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
        self.experiment.flush()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.experiment.add_scalar(self.prefix + key, value, step)

    def report(self, result: dict) -> None:
        from torch.utils.tensorboard.summary import hparams

        found = numbers(result)
        for summary in hparams(self.settings, found):  # the page's table of runs
            self.experiment.file_writer.add_summary(summary)
        for key, value in found.items():
            self.experiment.add_scalar(key, value, 0)
        if result["layers"]:
            columns, rows = layer_table(result["layers"])
            lines = [columns, ["---"] * len(columns), *rows]
            self.experiment.add_text("layers", "\n".join("|".join(map(str, line)) for line in lines))
            self.experiment.add_image("ranks", np.asarray(rank_plot(result["layers"])), dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.experiment.close()


def chosen_mode(wanted: str | None, wandb) -> str:
    """online or offline: what is asked for, or else online where there is a key, in the environment or by a login."""
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
    """The same for the same folder, so that a run that is taken up again is the same run."""
    return hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]


def run_label(out: Path) -> str:
    """The run's folder; of a suite's task the suite's too."""
    return (f"{out.parent.name}/{out.name}" if of_suite(out) else out.name)[-128:]


def of_suite(out: Path) -> bool:
    return HydraConfig.initialized() and out != Path(HydraConfig.get().runtime.output_dir)


def sweep(out: Path) -> str | None:
    """What a run is one of: its experiment, the folder of its sweep, or its suite; None of a single run."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    if not OmegaConf.is_missing(hydra.job, "num"):  # numbered: one of several
        return hydra.runtime.choices.get("experiment") or "/".join(Path(hydra.runtime.output_dir).parts[-3:-1])
    return out.parent.name if of_suite(out) else None


def labels(run: Run) -> dict[str, str]:
    """What runs are told apart by."""
    found = run.labels | {"model": run.cfg.model.name, "task": run.data.task or run.data.name}
    return found | ({} if run.budget.kind == "none" else {"budget": str(run.budget)})


def numbers(result: dict) -> dict[str, float]:
    """The numbers of a result under one flat name each: score, test/acc, account/retained, linear_probe/test ..."""
    parts = ("test", "account", "linear_probe", "distil", "weight_error", "logit_error", "best_epoch", "seconds")
    parts += ("profile", "elsewhere", "subspaces")
    found = {key: result[key] for key in parts if result.get(key) is not None}
    found |= {"best": result["val"], "score": result["test"].get(result["metric"])}
    if errors := found.pop("weight_error", None):
        found["weight_error"] = sum(errors.values()) / len(errors)
    return {k.replace(".", "/"): v for k, v in results.flat(found).items() if isinstance(v, int | float)}


def layer_table(layers: list[dict]) -> tuple[list[str], list[list]]:
    """The column names and the rows of `budget.layer_report`."""
    columns = list(dict.fromkeys(key for row in layers for key in row))
    cell = lambda value: "x".join(map(str, value)) if isinstance(value, list) else value  # noqa: E731
    return columns, [[cell(row.get(column)) for column in columns] for row in layers]


def rank_plot(layers: list[dict]) -> Image.Image:
    """Rank by depth, a line a role (CERSA Fig. 3, JACTUS Fig. 3); without ranks the share of its weights a layer
    holds."""
    from matplotlib.figure import Figure  # only runs that are watched need it

    ranks = [row.get("rank", row.get("basis_rank")) for row in layers]
    label = "held share of the dense weights" if None in ranks else "rank"
    values = [row["held"] for row in layers] if None in ranks else ranks
    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for role in dict.fromkeys(row["role"] for row in layers):
        here = [value for row, value in zip(layers, values, strict=True) if row["role"] == role]
        axes.plot(range(len(here)), here, marker="o", markersize=3, label=role)
    axes.set(xlabel="depth", ylabel=label)
    axes.legend(ncols=2, fontsize="small")
    pixels = BytesIO()
    figure.savefig(pixels, format="png")
    return Image.open(pixels).convert("RGB")
