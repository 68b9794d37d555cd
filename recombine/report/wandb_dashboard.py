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
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recombine import data
from recombine.errors import EXPECTED, UsageError, one_line
from recombine.runner import grid
from recombine.runtime.atomic import replacing

X = "trainer/global_step"


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

    by_method = wr.Config("labels.method")

    def bars(*keys: str):
        grouped = {"groupby": by_method, "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return [wr.BarPlot(title=key, metrics=[wr.SummaryMetric(key)], orientation="h", **grouped) for key in keys]

    def against(y: str, *keys: str, log: bool = False):
        return [
            wr.ScatterPlot(title=f"{y} by {x}", x=wr.SummaryMetric(x), y=wr.SummaryMetric(y), log_x=log) for x in keys
        ]

    def curves(*keys: str):
        return [wr.LinePlot(title=key, x=X, y=[key], groupby=by_method) for key in keys]

    layers = [
        wr.MediaBrowser(title="ranks by layer", media_keys=["ranks"]),
        wr.WeavePanelSummaryTable(table_name="layers"),
    ]
    kind = family(experiment.config)
    asked = questions(experiment.config) if kind == "language" else []
    sections = {
        "adaptation": {
            "scores": [*bars("score", "linear_probe/test")],
            "what it costs": [
                *against("score", "account/trained_without_head", "account/memory_mib", log=True),
                *bars("account/memory_mib"),
            ],
            "training": curves("train/loss", "val/loss", "val/acc"),
            "layers": layers,
        },
        "compression": {
            "scores": [*bars("score", "linear_probe/test", "weight_error")],
            "what is kept": [
                *against("score", "account/retained", "account/flops"),
                *against("weight_error", "account/retained"),
            ],
            "distillation": curves("distilled/train/loss", "distilled/val/loss"),
            "training": curves("train/loss", "val/loss", "val/acc"),
            "layers": layers,
        },
        "language": {
            "scores": [*bars("test/ppl", *(f"test/{task}/acc" for task in asked))],
            "what is kept": [
                *against("test/ppl", "account/retained", "account/memory_mib"),
                *bars("account/memory_mib"),
            ],
            "training": curves("distilled/val/loss", "train/loss", "val/loss"),
            "layers": layers,
        },
        "speed": {
            "beside the reference": bars("profile/ratio/train", "profile/ratio/infer"),
            "what it costs": [
                *against("profile/ratio/train", "account/trained_without_head", log=True),
                *bars("account/flops", "account/memory_mib"),
            ],
            "layers": layers,
        },
    }[kind]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=experiment.report.get("title", name),
        sections=[ws.Section(name=title, panels=panels, is_open=True) for title, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis=X, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=f"Metric('Group') == '{name}'", groupby=[ws.Config("labels.method"), ws.Config("labels.task")]
        ),
    )


def questions(config: DictConfig) -> list[str]:
    """The harness's tasks that a language model is scored on."""
    module = data.build(**OmegaConf.to_container(config.data, resolve=True), seed=config.seed)
    return list(config.harness.tasks or module.harness)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recombine.report.wandb_dashboard", description=__doc__.split("\n")[0]
    )
    parser.add_argument("experiment", help="a name below conf/experiment, for example cersa/tab09")
    parser.add_argument("--save", action="store_true", help="make it in the project (needs a login)")
    parser.add_argument("--entity", default="", help="the W&B user or team; yours if left out")
    parser.add_argument("--project", default="recombine")
    parser.add_argument("--out", type=Path, help="of the JSON file; outputs/<experiment>/dashboard.json if left out")
    given = parser.parse_args(arguments)
    try:
        made = workspace(given.experiment, given.entity, given.project)
        path = given.out or grid.load(given.experiment).folder / "dashboard.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(definition(made), indent=1))
        print(path)
        if given.save:
            print(save(made))
    except EXPECTED as error:
        print(f"recombine.report.wandb_dashboard: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def definition(made) -> dict:
    """What W&B stores of a workspace."""
    return json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))


def save(made) -> str:
    """Its address."""
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UsageError("--save: there is no key; set WANDB_API_KEY, or run `wandb login` once")
    try:
        return made.save().url
    except Exception as error:  # the client's own errors and its transport's
        raise UsageError(f"--save: W&B fails ({str(error).splitlines()[0]}); the JSON is written") from error


if __name__ == "__main__":
    sys.exit(main())
