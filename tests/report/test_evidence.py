"""From runs to committed evidence and back."""

import json
import shutil
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from helpers import CONF, ROOT
from helpers.report_runs import entries
from recombine import report
from recombine.errors import UsageError
from recombine.report import __main__ as command
from recombine.report import records, render
from recombine.runner import ranks
from recombine.runner.grid import Experiment


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Outputs and evidence in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "EVIDENCE", tmp_path / "experiments")
    return tmp_path


def test_from_runs_to_evidence_and_back(here):
    """Two real runs: their records tell the same table when the results are gone."""
    methods = {"CERSA": {"method": "cersa", "method.alpha": 0.5}, "SVD": {"method": "svd", "method.rank": 4}}
    losses = {"train": "curves.train/loss", "val": "curves.val/loss"}
    given = {
        "grid": {"method": methods, "seed": [0, 1]},
        "only": None,
        "data": {"limit": 64, "task": "${other}"},
        "report": {
            "rows": "method",
            "values": {"top-1": {"key": "test.{metric}", "scale": 100, "best": "max"}},
            "extra": {"held": {"key": "account.retained", "digits": 2}},
            "plots": {
                "ranks": {"kind": "ranks", "y": "rank", "line": "method"},
                "losses": {"kind": "curves", "y": losses, "line": "method", "panel": "value"},
                "memory": {"kind": "xy", "x": "account.memory_mib", "y": "test.acc", "point": "method"},
            },
        },
    }
    experiment = Experiment("tiny", OmegaConf.create(given))
    tiny = [
        "model=tiny_vit",
        "trainer=cpu",
        "trainer.progress=false",
        "trainer.epochs=2",
        "data.limit=64",
        "probe=false",
    ]
    results = {}
    for cell in [c for c in experiment.cells if c.labels["seed"] == "0"]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", [*tiny, *cell.overrides])
        ranks.main(cfg, experiment.folder / cell.folder)
        results[cell.labels["method"]] = json.loads((experiment.folder / cell.folder / "result.json").read_text())
    failed = next(c for c in experiment.cells if c.labels["seed"] == "1")
    (experiment.folder / failed.folder).mkdir()
    (experiment.folder / failed.folder / "failed.txt").write_text("the disk is full\n")
    made = report.build(experiment)
    for name, result in results.items():
        assert entries(made.table, name)["top-1"].mean == pytest.approx(100 * result["test"]["acc"])
        curves = result["curves"]
        assert len(curves["train/loss"]) == len(curves["val/acc"]) == 2
        assert max(curves["val/acc"]) == pytest.approx(result["val"]["acc"], abs=1e-4)
    assert made.table.notes[0] == "2 of 4 runs. 1 failed: the disk is full."

    written = report.save(made)
    names = {"runs.jsonl", "config.json", "table.md", "table.tex", "table.csv", "ranks.svg", "losses.svg", "memory.svg"}
    assert {p.name for p in written} == names == {p.name for p in (here / "experiments/tiny").iterdir()}
    path = experiment.folder / experiment.cells[0].folder / "result.json"
    whole = path.read_text()
    path.write_text('{"a": 1')
    with pytest.raises(UsageError, match=r"--save: .*result.json is left out .* committed result of that cell"):
        report.save(report.build(experiment))
    path.write_text(whole)
    slim = records.lines(here / "experiments/tiny/runs.jsonl")[0]
    dense = next(r for n, r in results.items() if slim["method"]["name"] == r["method"]["name"])
    assert slim["layers"]["q"]["rank"] == [row["rank"] for row in dense["layers"] if row["role"] == "q"]
    assert len(slim["config"]) == 12 and "checkpoint" not in slim
    changed = Experiment("tiny", OmegaConf.create(given | {"data": {"limit": 32}}))
    found = report.build(changed).table
    assert found.done == 0 and "Left out: 2 of another configuration (data.limit=64 there, 32 here)." in found.notes[0]
    changed = Experiment("tiny", OmegaConf.create(given | {"optim": {"name": "sgd"}}))  # a key with a default since
    found = report.build(changed).table
    assert found.done == 0 and "Left out: 2 of another configuration (optim.name=adamw there, sgd" in found.notes[0]
    assert json.loads((here / "experiments/tiny/config.json").read_text()) == {"data.limit": 64}
    (experiment.folder / experiment.cells[0].folder / "result.json").unlink()
    (experiment.folder / experiment.cells[0].folder / "failed.txt").write_text("the disk is full\n")
    mixed = report.build(experiment)
    assert len(mixed.runs.failed) == 2 and "1 of them are from the committed runs.jsonl" in mixed.table.notes[0]
    shutil.rmtree(here / "outputs")
    assert len(report.build(changed).runs.other) == 2  # what is committed is held against config.json
    again = report.build(experiment)
    assert render.text(again.table).replace("2 of 4 runs.", "2 of 4 runs. 1 failed: the disk is full.") == render.text(
        made.table
    )
    before = {p.name: p.read_bytes() for p in written}
    report.save(again)
    same = {p.name for p in written if p.read_bytes() == before[p.name]}
    assert same >= names - {"table.md", "table.tex"}  # these two name the failure


def test_nothing_is_saved_of_a_part_of_the_grid_or_of_nothing(here):
    given = {"grid": {"seed": [0, 1]}, "only": None, "report": {"values": {"top-1": {"key": "test.acc"}}}}
    for overrides, why in (((), "has no results yet"), (("seed=0",), "evidence is the whole grid")):
        made = report.build(Experiment("tiny", OmegaConf.create(given), overrides))
        with pytest.raises(UsageError, match=why):
            report.save(made)
    assert "0 of 1 runs." in render.text(made.table) and not (here / "experiments").exists()


def test_no_torch_for_a_table():
    code = (
        "import sys, recombine.report.__main__; print([m for m in ('torch', 'lightning', 'timm') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


def test_the_command_refuses_in_one_line(capsys):
    assert command.main(["nonsense"]) == 2
    assert capsys.readouterr().err.startswith("report: experiment=nonsense: there is none")
    assert command.main(["offline/crisp_tab05", "hydra.sweep.dir=elsewhere"]) == 2  # it would read others in silence
    assert capsys.readouterr().err.startswith("report: hydra.sweep.dir=elsewhere: results are read from outputs/")


def test_a_result_of_another_shape_is_named_and_the_rest_is_shown(here):
    given = {"grid": {"seed": list(range(8))}, "only": None, "report": {"values": {"top-1": {"key": "test.acc"}}}}
    experiment = Experiment("tiny", OmegaConf.create(given))
    texts = [
        "[]",
        "5",
        "null",
        '{"config": 5}',
        '{"test": {"acc": "x"}}',
        '{"layers": [{}]}',
        "{",
        '{"test": {"acc": 0.5}}',
    ]
    for cell, text in zip(experiment.cells, texts, strict=True):
        (folder := experiment.folder / cell.folder).mkdir(parents=True)
        (folder / "result.json").write_text(text)
    made = report.build(experiment)
    assert len(made.runs.unread) == 7 and [record.get("test.acc") for record in made.runs.records] == [0.5]
    note = made.table.notes[0]
    assert "7 cannot be read: " in note and note.count("move it away") == 7 and "\n" not in note


def test_a_committed_line_of_another_shape_is_refused(here):
    (file := here / "runs.jsonl").write_text('{"cell": "a", "test": 5}\n')
    with pytest.raises(UsageError, match="test is no .*restore it"):
        records.lines(file)


def test_markdown_shows_cells_as_they_are():
    evil = "a|b <script>x</script> [l](http://x) `c` *d*\n# e"
    assert render.plain(evil) == "a\\|b &lt;script>x&lt;/script> \\[l\\](http://x) \\`c\\` \\*d\\* # e"
