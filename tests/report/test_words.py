"""Words for keys on tables, plots and the page; the README's picture names its methods."""

import csv
import io
import runpy

import pytest

from helpers import ROOT
from helpers.report_runs import SPEC, entries
from recombine.data.vision.suites import Fgvc, Vision8
from recombine.data.vision.vtab import Vtab
from recombine.report import render, table, words
from recombine.report.records import Record, Runs
from recombine.runner import grid


def test_an_axis_or_a_path_is_shown_in_words():
    assert words.heading("data.task") == "task" and words.heading("method.basis_rank") == "basis rank"
    assert words.heading("account.trained_without_head") == "trained parameters without the head"
    assert words.heading("account/memory_mib") == words.heading("account.memory_mib") == "memory to train (MiB)"
    assert words.heading("seed") == "seed" and words.heading("calibration.batch_size") == "batch size"


@pytest.mark.parametrize(
    "axis, name, shown",
    [
        ("data.task", "cifar", "CIFAR-100"),  # of VTAB-1k
        ("data.task", "my_own", "my own"),
        ("role", "q", "query"),
        ("budget", "retained_50", "50 % kept"),
        ("budget", "trainable_150k", "150k trained parameters"),
        ("budget", "40%", "40%"),
        ("method.mimicry.loss", "smooth_l1", "smooth L1"),
        ("method", "CERSA (α_1)", "CERSA (α_1)"),  # written out in the YAML
    ],
)
def test_a_label_is_shown_in_words(axis, name, shown):
    assert words.label(axis, name) == shown


@pytest.mark.parametrize("suite", [Vtab, Fgvc, Vision8])
def test_tasks_have_the_words_of_their_data_module(suite):
    for task in suite.rows:
        assert words.label("data.task", task).casefold() == suite.task_labels[task].casefold()


def test_no_key_is_left_in_the_tables_of_the_experiments():
    """No head and no row label of a table has a dot between letters or an underscore."""
    for path in sorted((grid.CONF / "experiment/offline").glob("*.yaml")):
        experiment = grid.load(f"offline/{path.stem}")
        if not experiment.grid or not experiment.report:
            continue
        cells = [cell.labels for cell in experiment.cells]
        found = table.build(experiment.name, experiment.report, Runs([], cells, {}))
        shown = [*found.heads, *(column.title for column in found.columns if column.kind == "cell")]
        own = {*(experiment.report["values"]), None}
        shown = [name for name in shown + [name for row in found.rows for name in row.names] if name not in own]
        assert [name for name in shown if "_" in name or "data." in name or "method." in name] == [], path


def test_csv_keeps_the_keys_and_the_other_formats_show_words():
    cells = [{"method": "LoRA", "data.task": task, "seed": "0"} for task in ("svhn", "dsprites_loc")]
    records = [Record(cell, {"metric": "acc", "test": {"acc": 0.5}, "cell": cell["data.task"]}, "x") for cell in cells]
    spec = {"rows": "data.task", "values": SPEC["values"]}
    found = table.build("x", spec, Runs(records, cells, {}))
    lines = list(csv.DictReader(io.StringIO(render.as_csv(found))))
    assert [line["data.task"] for line in lines] == ["svhn", "dsprites_loc"]
    assert entries(found, "SVHN")["top-1"].mean == 50
    for shown in (render.text(found), render.markdown(found), render.latex(found)):
        assert "SVHN" in shown and "dSprites location" in shown and "data.task" not in shown


def test_the_readmes_picture_has_every_method_once_and_places_only_labels_that_exist():
    script = runpy.run_path(str(ROOT / "scripts/readme_figure.py"))
    points = [(compressed, dot.label) for compressed, dot in script["dots"]()]
    names = [name for _, name in points]
    assert len(names) == len(set(names)) and set(script["PLACES"]) <= set(names)
    assert {(False, "LoRA"), (False, "full fine-tuning"), (True, "JACTUS 80%"), (True, "CRISP 49%")} <= set(points)
    assert (ROOT / "docs/methods.svg").stat().st_size < 150_000
