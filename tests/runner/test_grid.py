"""Grids of an experiment, and how the command line narrows them."""

import json
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from helpers.command import line
from recombine.errors import UsageError
from recombine.report.records import EVIDENCE
from recombine.runner import grid, override_lines

GRID = {
    "method": {"LoRA": {"method": "lora", "method.rank": 4}, "CERSA (α = 0.9)": {"method": "cersa"}},
    "data.task": ["a", "b"],
    "seed": [0, 1],
}


def test_a_grid_is_the_product_of_its_axes_with_the_last_axis_slowest():
    cells = grid.cells(GRID)
    assert len(cells) == 8 and [c.labels["seed"] for c in cells] == ["0"] * 4 + ["1"] * 4
    assert cells[0].labels == {"method": "LoRA", "data.task": "a", "seed": "0"}
    assert cells[0].overrides == ("method=lora", "method.rank=4", "data.task=a", "seed=0")
    assert len({c.folder for c in cells}) == 8


def test_the_command_line_narrows_a_grid():
    assert {c.labels["seed"] for c in grid.cells(GRID, ["seed=7,8"])} == {"7", "8"}
    assert len(grid.cells(GRID, ["seed=0", "trainer.epochs=3"])) == 4
    assert all("trainer.epochs=3" in c.overrides for c in grid.cells(GRID, ["trainer.epochs=3"]))
    assert {c.labels["seed"] for c in grid.cells(GRID, ["++seed=5"])} == {"5"}
    assert all("~data.limit" in c.overrides for c in grid.cells(GRID, ["~data.limit"]))
    kept = grid.cells(GRID, only=["CERSA (α = 0.9)", "b"])
    assert [list(c.labels.values()) for c in kept] == [["CERSA (α = 0.9)", "b", "0"], ["CERSA (α = 0.9)", "b", "1"]]
    # a narrowed grid has the folders of the whole one
    assert {c.folder for c in grid.cells(GRID, ["seed=0"])} < {c.folder for c in grid.cells(GRID)}


def test_a_cell_that_is_written_out_is_chosen():
    """As the command of its result has it; what is typed beside it holds for it alone."""
    for cell in grid.cells(GRID):
        assert grid.cells(GRID, cell.overrides) == [cell]
        (more,) = grid.cells(GRID, [*reversed(cell.overrides), "x=1"])
        assert set(more.overrides) == {*cell.overrides, "x=1"} and more.labels == cell.labels | {"x": "1"}
    wide = {"method": {"all": {}, "LoRA": {"method": "lora"}}, "seed": [0, 1]}
    assert len(grid.cells(wide, ["seed=1"])) == 2  # a plain axis is narrowed
    assert [c.labels["method"] for c in grid.cells(wide, ["method=lora", "seed=1"])] == ["LoRA"]
    with pytest.raises(UsageError, match="method=lora: the labels of grid.method set method"):
        grid.cells(GRID, ["method=lora", "method.rank=8", "data.task=a", "seed=0"])


@pytest.mark.parametrize("path", sorted(EVIDENCE.rglob("runs.jsonl")), ids=lambda path: str(path.parent.name))
def test_the_command_of_every_committed_run_is_one_run(path):
    name = str(path.parent.relative_to(EVIDENCE))
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        _, _, *words = shlex.split(row["command"])
        (experiment,) = [word for word in words if word.startswith("experiment=")]
        assert experiment == f"experiment={name}" or name == "leaderboard/joint"  # seed 0 is that of rates
        own = grid.read(experiment.split("=")[1]).grid
        assert len(grid.cells(own, [word for word in words if word != experiment])) == 1, row["command"]


def test_a_label_has_other_overrides_beside_some_label_of_another_axis():
    rows = {"A": {"method": "lora", "optim.lr": 0.1, "seed=1": {"optim.lr": 0.2, "x": 3}}, "B": {"method": "svd"}}
    cells = {tuple(c.labels.values()): set(c.overrides) for c in grid.cells({"method": rows, "seed": [0, 1]})}
    assert cells["A", "0"] == {"method=lora", "optim.lr=0.1", "seed=0"}
    assert cells["A", "1"] == {"method=lora", "optim.lr=0.2", "x=3", "seed=1"}
    assert cells["B", "1"] == {"method=svd", "seed=1"}
    typed = grid.cells({"method": rows, "seed": [0, 1]}, ["seed=1,5"], ["A"])
    assert [set(c.overrides) & {"optim.lr=0.1", "optim.lr=0.2"} for c in typed] == [{"optim.lr=0.2"}, {"optim.lr=0.1"}]


@pytest.mark.parametrize("axes, overrides, only, why", [
    ({"x": {"A": {"seed=3": {"y": 1}}}, "seed": [1]}, [], None, "grid.x.A: seed=3: .*: must be AXIS=LABEL of another"),
    ({"x": {"A": {"seed=1": 4}}, "seed": [1]}, [], None, "grid.x.A: seed=1: 4: must be AXIS=LABEL of another axis"),
    ({"x": {"A": {"seed=1": {"y": 1}}}, "seed": [1]}, ["y=2"], None, "y=2: the labels of grid.x set y"),
    (GRID, ["method=svd"], None, r"method=svd: the labels of grid.method set method; choose some of them with only"),
    (GRID, [], ["LoRa"], r"only=LoRa: no axis of the grid has this label; they are LoRA, CERSA"),
    ({"seed": []}, [], None, r"grid.seed=\[\]: must be a list of values, or labels"),
    ({"x": {"A": {"seed": 1}, "B": {"seed": 1}}}, [], None, r"grid: two cells are seed=1; their overrides must differ"),
    ({}, ["optim.lr=interval(0,1)"], None, r"optim.lr=interval\(0,1\): a grid takes lists of values"),
    ({}, ["seed=range(0)"], None, r"seed=range\(0\): there is no value in it, so nothing would run; give .* seed=1,2"),
    ({"seed": {}}, [], None, r"grid.seed=\{\}: must be a list of values, or labels"),
    ({"seed": None}, [], None, "grid.seed=None: must be a list of values, or labels"),
    (GRID, [], [], r"only=\[\]: chooses nothing, so nothing would run"),
    ({}, [], ["LoRA"], "only=LoRA: no axis of the grid has this label"),
])  # fmt: skip
def test_bad_grids_are_one_line(axes, overrides, only, why):
    with pytest.raises(UsageError, match=why):
        grid.cells(axes, overrides, only)


@pytest.mark.parametrize("arguments, why", [
    (["hydra.mode=MULTIRUN", "seed=range(0)"], "seed=range(0): there is no value in it, so nothing would run"),
    (["hydra.mode=MULTIRUN", "grid=5"], "grid=5: must be axes, or null"),
    (["only=LoRA"], "only=LoRA: chooses cells of a grid, and there is none"),
    (["hydra.mode=MULTIRUN", "seed=1", "only=[nope]"], "only=['nope']: chooses cells of a grid, and there is none"),
    (["experiment=offline/cersa_tab06", "only=[]"], "only=[]: chooses nothing, so nothing would run"),
])  # fmt: skip
def test_a_sweep_that_would_run_nothing_is_an_error(arguments, why, tmp_path, capsys, monkeypatch):
    words = [*arguments, f"hydra.sweep.dir={tmp_path}/out"]
    assert why in line(capsys, monkeypatch, tmp_path, *words)
    assert not list(tmp_path.rglob("failed.txt"))


@pytest.mark.parametrize(
    "value", ["a", 1, -2.5, 1e-4, True, None, "α = 0.9", "it's", "a,b", [1, "x y"], {"a": [1]}, ""]
)
def test_overrides_say_what_the_yaml_said(value):
    parsed = OverridesParser.create().parse_override(f"key={override_lines.quoted(value)}").value()
    assert str(parsed) == str(value) if isinstance(value, list | dict) else parsed == value
