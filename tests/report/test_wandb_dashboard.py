"""The W&B dashboard of each family."""

import json

import pytest

from recombine.report import wandb_dashboard
from recombine.runner import grid

pytestmark = pytest.mark.usefixtures("no_wandb_account")


@pytest.mark.parametrize(
    "experiment, family, panels",
    [
        ("cersa/tab09", "adaptation", ["account/trained_without_head", "train/loss"]),
        ("start", "compression", ["account/retained", "distilled/val/loss"]),
        ("offline/llama", "language", ["test/ppl", "test/wordnet_definition/acc"]),
        ("crisp/tab05", "speed", ["profile/ratio/train", "account/flops"]),
    ],
)
def test_dashboard_of_each_family(experiment, family, panels, tmp_path, capsys):
    from wandb_workspaces.workspaces import Workspace, internal

    path = tmp_path / "dashboard.json"
    assert wandb_dashboard.main([experiment, "--out", str(path)]) == 0 and str(path) in capsys.readouterr().out
    assert wandb_dashboard.family(grid.load(experiment).config) == family
    found = json.loads(path.read_text())
    text = json.dumps(found)
    written = ('"{}"', '"summary:{}"', '"summary_metrics.{}"')
    assert all(any(form.format(key) in text for form in written) for key in panels), text
    again = Workspace._from_model(internal.View.model_validate(found))  # what W&B's client makes of it
    assert [section.name for section in again.sections][-1] == "layers" and experiment in again.runset_settings.filters


def test_dashboard_refuses_in_one_line(capsys, tmp_path):
    assert wandb_dashboard.main(["nosuch/table"]) == 2
    assert "nosuch/table" in capsys.readouterr().err
    assert wandb_dashboard.main(["start", "--save", "--out", str(tmp_path / "d.json")]) == 2
    assert "WANDB_API_KEY" in capsys.readouterr().err and (tmp_path / "d.json").exists()
