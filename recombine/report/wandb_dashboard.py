"""A W&B dashboard for an experiment, as code: what `logger=wandb` logs, laid out for the family of its tables.

    python -m recombine.report.wandb_dashboard cersa/tab09           writes outputs/cersa/tab09/dashboard.json
    python -m recombine.report.wandb_dashboard cersa/tab09 --save     makes it in your W&B project

Families: adaptation (accuracy against what trains and what it takes), compression (accuracy against what is kept, and
the distillation), language models (perplexity, the harness's tasks) and speed (stage=profile). It shows the runs of one
group, which is the experiment's name.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from recombine import data
from recombine.errors import EXPECTED, UsageError, first_line, one_line
from recombine.report import words
from recombine.runner import grid
from recombine.runtime.atomic import atomic_write

X = "trainer/global_step"


class Panel(NamedTuple):
    """A panel of a dashboard. kind: bars or curves of y by method, points of y against x, or the layers' two."""

    kind: str
    y: str = ""
    x: str = ""
    log: bool = False


def bars(*keys: str) -> list[Panel]:
    """A bar chart for each key of the summary, for example "test/acc"."""
    return [Panel("bars", key) for key in keys]


def curves(*keys: str) -> list[Panel]:
    """A curve over the training steps for each metric, for example "val/loss"."""
    return [Panel("curves", key) for key in keys]


def against(y: str, *keys: str, log: bool = False) -> list[Panel]:
    """Runs as points, y over each of the keys; log: the horizontal axis is logarithmic."""
    return [Panel("points", y, x, log) for x in keys]


TASKS = Panel("tasks")  # stands for bars of the tasks that a language model is scored on
LAYERS = [Panel("ranks"), Panel("layers")]
SECTIONS: Mapping[str, Mapping[str, Sequence[Panel]]] = {
    "adaptation": {
        "scores": bars("score", "linear_probe/test"),
        "what it costs": [
            *against("score", "account/trained_without_head", "account/memory_mib", log=True),
            *bars("account/memory_mib"),
        ],
        "training": curves("train/loss", "val/loss", "val/acc"),
        "layers": LAYERS,
    },
    "compression": {
        "scores": bars("score", "linear_probe/test", "weight_error"),
        "what is kept": [
            *against("score", "account/retained", "account/flops"),
            *against("weight_error", "account/retained"),
        ],
        "distillation": curves("distilled/train/loss", "distilled/val/loss"),
        "training": curves("train/loss", "val/loss", "val/acc"),
        "layers": LAYERS,
    },
    "language": {
        "scores": [*bars("test/ppl"), TASKS],
        "what is kept": [
            *against("test/ppl", "account/retained", "account/memory_mib"),
            *bars("account/memory_mib"),
        ],
        "training": curves("distilled/val/loss", "train/loss", "val/loss"),
        "layers": LAYERS,
    },
    "speed": {
        "beside the reference": bars("profile/ratio/train", "profile/ratio/infer"),
        "what it costs": [
            *against("profile/ratio/train", "account/trained_without_head", log=True),
            *bars("account/flops", "account/memory_mib"),
        ],
        "layers": LAYERS,
    },
}


def family(config: DictConfig) -> str:
    """adaptation, compression, language or speed."""
    if config.stage.name == "profile":
        return "speed"
    if data.find(config.data.name).objective == "lm":
        return "language"
    return "adaptation" if config.stage.name in ("adapt", "evaluate") else "compression"


def workspace(name: str, entity: str, project: str):
    """The dashboard of an experiment, not saved yet.

    Raises:
        UsageError: there is no such experiment, or wandb-workspaces is not installed.
    """
    experiment = grid.load(name)
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UsageError(f"dashboard: {error}; pip install -e '.[watch]'") from error

    sections = SECTIONS[family(experiment.config)]
    tasks = questions(experiment.config) if any(TASKS in panels for panels in sections.values()) else []
    scores = bars(*(f"test/{task}/acc" for task in tasks))
    drawn = []
    for title, panels in sections.items():
        listed = [p for panel in panels for p in (scores if panel == TASKS else [panel])]
        drawn.append(ws.Section(name=title, panels=[draw(panel, wr) for panel in listed], is_open=True))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=experiment.report.get("title", name),
        sections=drawn,
        settings=ws.WorkspaceSettings(x_axis=X, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=f"Metric('Group') == '{name}'", groupby=[ws.Config("labels.method"), ws.Config("labels.task")]
        ),
    )


def draw(panel: Panel, wr):
    """A panel as W&B's. wr: the module wandb_workspaces.reports.v2."""
    title, by_method = words.heading(panel.y), wr.Config("labels.method")
    if panel.kind == "bars":
        grouped = {"groupby": by_method, "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return wr.BarPlot(title=title, metrics=[wr.SummaryMetric(panel.y)], orientation="h", **grouped)
    if panel.kind == "points":
        x, y = wr.SummaryMetric(panel.x), wr.SummaryMetric(panel.y)
        return wr.ScatterPlot(title=f"{title} by {words.heading(panel.x)}", x=x, y=y, log_x=panel.log)
    if panel.kind == "curves":
        return wr.LinePlot(title=title, x=X, y=[panel.y], groupby=by_method)
    if panel.kind == "ranks":
        return wr.MediaBrowser(title="ranks by layer", media_keys=["ranks"])
    return wr.WeavePanelSummaryTable(table_name="layers")


def questions(config: DictConfig) -> list[str]:
    """The harness's tasks that a language model is scored on."""
    module = data.build(**OmegaConf.to_container(config.data, resolve=True), seed=config.seed)
    return list(module.harness if config.harness.tasks is None else config.harness.tasks)


def main(arguments: list[str] | None = None) -> int:
    """The command line; arguments: None for the process's own. Returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m recombine.report.wandb_dashboard", description=__doc__.split("\n")[0]
    )
    parser.add_argument("experiment", help="a name below conf/experiment, for example cersa/tab09")
    parser.add_argument("--save", action="store_true", help="also make it in your W&B project (needs a login)")
    parser.add_argument("--entity", default="", help="the W&B user or team (default: yours)")
    parser.add_argument("--project", default="recombine")
    parser.add_argument("--out", type=Path, help="the JSON file (default: outputs/<experiment>/dashboard.json)")
    given = parser.parse_args(arguments)
    try:
        dashboard = workspace(given.experiment, given.entity, given.project)
        path = given.out or grid.load(given.experiment).folder / "dashboard.json"
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(definition(dashboard), indent=1))
        print(path)
        if given.save:
            print(save(dashboard))
    except EXPECTED as error:
        print(f"recombine.report.wandb_dashboard: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def definition(dashboard) -> dict:
    """What W&B stores of a workspace."""
    return json.loads(dashboard._to_model().model_dump_json(by_alias=True, exclude_none=True))


def save(dashboard) -> str:
    """Makes it in the W&B project; returns its address."""
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UsageError("--save: there is no key; set WANDB_API_KEY, or run `wandb login` once")
    try:
        return dashboard.save().url
    except Exception as error:  # the client's own errors and its transport's
        raise UsageError(f"--save: W&B fails ({first_line(error)}); the JSON is written") from error


if __name__ == "__main__":
    sys.exit(main())
