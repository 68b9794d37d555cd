"""The report: its arithmetic against numpy, the papers' files against themselves, every format, every kind of plot."""

import csv
import io
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recombine import report
from recombine.errors import UsageError
from recombine.report import __main__ as command
from recombine.report import plots, records, render, table, table_data
from recombine.report.paper import Paper
from recombine.report.records import Record, Runs
from recombine.runner import ranks
from recombine.runner.grid import Experiment

ROOT = Path(__file__).parents[1]
TAB07 = "experiments/cersa/tab07_vitl_8datasets.csv"
METHODS, TASKS, SEEDS = ("LoRA", "CERSA", "SVFit"), ("a", "b", "c"), ("0", "1", "2")
RNG = np.random.default_rng(0)
SCORES = RNG.uniform(0.5, 0.9, (3, 3, 3))  # (method, task, seed)


def runs(keep=lambda labels: True, **more) -> Runs:
    """A full grid of results with the numbers of SCORES, of which some are left out."""
    cells = [
        {"method": m, "data.task": t, "seed": s} for s, t, m in itertools.product(SEEDS, TASKS, METHODS)
    ]  # as a grid orders them: the last axis slowest
    made = []
    for cell in filter(keep, cells):
        i, j, k = METHODS.index(cell["method"]), TASKS.index(cell["data.task"]), SEEDS.index(cell["seed"])
        result = {
            "cell": "/".join(cell.values()),
            "metric": "acc",
            "test": {"acc": float(SCORES[i, j, k])},
            "account": {"memory_mib": 100.0 * (i + 1), "trained": 10**i},
            "curves": {"train/loss": [3.0 - i, 2.0 - i / 2 + k / 10, 1.0]},
            "layers": {"q": {"rank": [4 + i, 6 + i]}, "o": {"rank": [8, 10]}},
            "similarity": {"q": [[1.0, 0.9], [0.99, 0.999]]},
            "environment": {"commit": "a" * 40, "device": "cpu", "versions": {"torch": "2.13.0"}},
        }
        made.append(Record(cell, result | {k: v(cell) for k, v in more.items()}, result["cell"]))
    return Runs(made, cells, {})


SPEC = {
    "title": "A table",
    "rows": "method",
    "columns": "data.task",
    "values": {"top-1": {"key": "test.{metric}", "scale": 100, "digits": 1, "best": "max"}},
    "extra": {"memory": {"key": "account.memory_mib", "digits": 1, "best": "min"}},
    "means": {"ab": ["a", "b"], "groups": ["ab", "c"], "mean": None},
}


def entries(made: table.Table, row: str) -> dict[str, table_data.Entry]:
    (found,) = (r for r in made.rows if r.name == row)
    return dict(zip([c.title for c in made.columns], found.entries, strict=True))


def test_means_and_deviations_are_numpys():
    made = table.build("x", SPEC, runs())
    for i, method in enumerate(METHODS):
        found, s = entries(made, method), 100 * SCORES[i]
        for j, task in enumerate(TASKS):
            assert found[task].mean == pytest.approx(s[j].mean()) and found[task].n == 3
            assert found[task].spread == pytest.approx(s[j].std(ddof=1))
        assert found["ab"].mean == pytest.approx(s[:2].mean())
        assert found["mean"].mean == pytest.approx(s.mean()) and found["mean"].spread == pytest.approx(
            s.mean(0).std(ddof=1)
        )
        assert found["groups"].mean == pytest.approx((s[:2].mean() + s[2].mean()) / 2)  # not the mean of the tasks
        assert found["groups"].spread == pytest.approx(((s[0] + s[1]) / 4 + s[2] / 2).std(ddof=1))
        assert found["memory"].mean == 100 * (i + 1) and found["memory"].spread is None
    assert made.notes[:2] == ["27 of 27 runs.", "Mean ± sample standard deviation over the seeds (n = 3)."]


def test_what_is_missing_shows_and_no_mean_hides_it():
    missing = {"method": "CERSA", "data.task": "b"}
    made = table.build(
        "x", SPEC, runs(lambda c: missing.items() - c.items() and (c["method"] != "SVFit" or c["seed"] == "0"))
    )
    found = entries(made, "CERSA")
    assert found["b"].mean is found["ab"].mean is found["groups"].mean is found["mean"].mean is None
    assert found["a"].n == 3 and entries(made, "SVFit")["a"].spread is None and found["b"].wanted == 3
    assert made.notes[0] == "18 of 27 runs."
    text = render.text(made)
    assert next(line for line in text.splitlines() if line.startswith("CERSA")).count(render.MISSING) == 5
    assert found["memory"].mean is None  # it may hang on the task
    assert "(1)" in text and "(3)" in text and "n in brackets" in text  # since n differs


def test_a_mean_is_over_the_seeds_that_every_column_has():
    made = table.build(
        "x", SPEC, runs(lambda c: c["method"] != "LoRA" or int(c["seed"]) <= TASKS.index(c["data.task"]))
    )
    found = entries(made, "LoRA")  # seed 0 of a, 0 and 1 of b, all of c
    assert [found[task].n for task in TASKS] == [1, 2, 3] and found["mean"].n == 1 and found["mean"].spread is None
    assert found["mean"].mean == pytest.approx(100 * SCORES[0, :, 0].mean())
    apart = table.build(
        "x", SPEC, runs(lambda c: c["method"] != "LoRA" or int(c["seed"]) == TASKS.index(c["data.task"]))
    )
    assert entries(apart, "LoRA")["mean"].mean is None and entries(apart, "LoRA")["ab"].n == 0
    alone = table.build("x", SPEC, runs(lambda c: c["seed"] == "0"))
    assert "(1)" in render.text(alone) and "n in brackets where runs are missing" in alone.notes[1]


def test_a_number_that_results_lack_is_named():
    made = table.build("x", SPEC | {"extra": {"speed": {"key": "profile.speed"}}}, runs())
    assert made.notes[2] == "speed (profile.speed): no number in 27 of 27 runs."


def test_a_truncated_mean_is_cut_and_a_cell_is_rounded():
    one = {"a": 0.69986, "b": 0.69986, "c": 0.69986}
    made = table.build("x", SPEC | {"truncate": True}, runs(test=lambda c: {"acc": one[c["data.task"]]}))
    assert entries(made, "LoRA")["mean"].text == "69.9" and entries(made, "LoRA")["a"].text == "70.0"
    assert table_data.shown(82.0, 1, cut=True) == "82.0" and table_data.shown(81.96, 1, cut=True) == "81.9"
    assert table_data.shown(-1.59, 1, cut=True) == "-1.5"


def test_the_best_is_per_column_and_block_and_ties_share_it():
    score = {"LoRA": 0.80001, "CERSA": 0.80002, "SVFit": 0.7}
    made = table.build("x", SPEC, runs(test=lambda c: {"acc": score[c["method"]]}))
    assert [entries(made, m)["a"].best for m in METHODS] == [True, True, False]  # both print 80.0
    assert [entries(made, m)["memory"].best for m in METHODS] == [True, False, False]
    blocks = table.build("x", SPEC | {"rows": ["data.task", "method"], "columns": None, "means": {}}, runs())
    assert [row.labels for row in blocks.rows][:4] == [("a", "LoRA"), ("a", "CERSA"), ("a", "SVFit"), ("b", "LoRA")]
    best = [row.labels for row in blocks.rows if row.entries[0].best]
    assert best == [(task, METHODS[SCORES[:, j].mean(1).argmax()]) for j, task in enumerate(TASKS)]


def test_what_is_no_column_is_averaged_within_a_seed():
    spec = {k: v for k, v in SPEC.items() if k not in ("columns", "means")}
    made = table.build("x", spec, runs(lambda c: c != {"method": "CERSA", "data.task": "b", "seed": "1"}))
    lora, cersa = entries(made, "LoRA")["top-1"], entries(made, "CERSA")["top-1"]
    assert lora.mean == pytest.approx(100 * SCORES[0].mean()) and (lora.n, cersa.n, cersa.wanted) == (3, 2, 3)
    assert lora.spread == pytest.approx(100 * SCORES[0].mean(0).std(ddof=1))
    assert cersa.mean == pytest.approx(100 * SCORES[1][:, [0, 2]].mean())  # seed 1 lacks a task


def test_values_can_be_the_rows():
    spec = {"columns": "data.task", "values": {"trained": {"key": "account.trained"}, "acc": {"key": "test.acc"}}}
    full = runs(lambda c: c["method"] == "LoRA")
    made = table.build("x", spec, Runs(full.records, [r.labels for r in full.records], {}))
    assert [row.name for row in made.rows] == ["trained", "acc"] and made.axes == ("value",)
    assert made.rows[1].entries[2].mean == pytest.approx(SCORES[0, 2].mean())


def test_the_papers_numbers_stand_beside_ours():
    paper = {
        "file": TAB07,
        "where": {"metric": "top1"},
        "columns": {"a": "CIFAR-100", "b": "DTD"},
        "means": {"mean": "Avg"},
        "extra": {"memory": "memory"},
    }
    made = table.build("x", SPEC | {"paper": paper}, runs())
    found = entries(made, "LoRA")
    assert found["a"].paper.text == "94.9" and found["memory"].paper.value == 1229.9 and found["c"].paper is None
    assert found["a"].difference == pytest.approx(float(found["a"].text) - 94.9)
    doubted = entries(made, "SVFit")["mean"].paper  # printed 88.7, and corrected
    assert doubted.value == 87.9 and "88.7" in doubted.doubt and any("88.7" in note for note in made.notes)
    ours, theirs = [float(entries(made, m)["a"].text) for m in METHODS], [94.9, 94.3, 93.9]
    same = sum((ours[i] - ours[j]) * (theirs[i] - theirs[j]) > 0 for i, j in itertools.combinations(range(3), 2))
    assert any(f"a {same} of 3" in note for note in made.notes)
    clear = {"LoRA": 0.7, "CERSA": 0.8, "SVFit": 0.9}  # the other way round
    other = table.build("x", SPEC | {"paper": paper}, runs(test=lambda c: {"acc": clear[c["method"]]}))
    assert any("a 0 of 3 (clearly not: CERSA over LoRA, SVFit over LoRA, SVFit over CERSA)" in n for n in other.notes)
    assert f"94.9 ({found['a'].difference:+.1f})".replace("-", "−") in render.text(made)
    ordered = table.build("x", SPEC | {"paper": paper | {"compare": "order"}}, runs())
    assert "94.9 (" not in render.text(ordered) and "94.9" in render.text(ordered)


def test_bad_reports_are_refused_in_one_line():
    def refused(spec, why):
        with pytest.raises(UsageError, match=why):
            table.build("x", SPEC | spec, runs())

    refused({"row": "method"}, "there is no such key; it takes title, rows")
    refused({"rows": "methods"}, "methods is no axis of the grid; choose from method, data.task, seed")
    refused({"means": {"mean": ["a", "z"]}}, "z is neither a column nor a mean")
    refused({"values": {}}, "empty")
    refused({"values": {"top-1": {"key": "test.acc", "best": "most"}}}, "must be max, min or null")
    refused({"values": {"top-1": {"path": "test.acc"}}}, "takes a key")
    refused({"values": {"top-1": "test.acc"}}, "top-1=test.acc: takes a key")
    refused({"values": {"top-1": {"key": "test.acc", "digits": "one"}}}, "takes a key")
    refused({"means": {"mean": []}}, "report.means.mean: empty")
    refused({"means": {"x": ["y"], "y": ["x"]}}, "rests on itself")
    refused({"paper": {"where": {}}}, "needs file")
    refused({"paper": {"file": TAB07, "compare": "diff"}}, "compare=diff: must be difference or order")
    refused({"paper": {"file": TAB07, "extra": {"memory": "memroy"}}}, "has no column memroy")
    refused({"paper": {"file": "experiments/none.csv"}}, "No such file")
    refused({"paper": {"file": TAB07, "rows": {"LoRA": "Lora"}}}, "LoRA: Lora is no row")
    refused({"paper": {"file": TAB07, "columns": {"a": {"data": "DTD"}}}}, "has no column data")
    refused({"paper": {"file": TAB07, "columns": {"a": {"metric": "top1"}}}}, "9 lines for .*; say more in `where`")


def test_every_format_says_the_same():
    paper = {"file": TAB07, "columns": {"a": "CIFAR-100"}}
    made = table.build("x", SPEC | {"paper": paper, "title": "50% of α & β_1", "notes": ["A note."]}, runs())
    best = max(METHODS, key=lambda m: entries(made, m)["a"].mean)
    shown = entries(made, best)["a"]
    printed = f"{shown.text} ± {shown.spread:.1f}"
    assert f"*{printed}" in render.text(made) and f"\033[1m {shown.text}\033[0m ±" in render.text(made, colour=True)
    assert f"| {best} | **{shown.text}** ± {shown.spread:.1f} |" in render.markdown(made)
    tex = render.latex(made)
    assert rf"\textbf{{{shown.text}}} $\pm$ {shown.spread:.1f} &" in tex and r"50\% of $\alpha$ \& $\beta$\_1" in tex
    assert tex.index(r"\toprule") < tex.index(r"\midrule") < tex.index(r"\bottomrule") and "A note." in tex
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {len(made.columns)} and len(body) == 1 + 2 * len(METHODS)
    lines = list(csv.DictReader(io.StringIO(render.as_csv(made))))
    assert len(lines) == len(METHODS) * len(made.columns)
    (one,) = (x for x in lines if x["method"] == best and x["column"] == "a")
    assert (
        float(one["mean"]) == pytest.approx(shown.mean, rel=1e-5)
        and one["best"] == "1"
        and float(one["paper"]) == shown.paper.value
    )


def test_one_value_does_not_get_the_papers_number_of_another():
    values = SPEC["values"] | {"loss": {"key": "curves.x"}}
    paper = {"file": TAB07, "where": {"metric": "top1"}, "columns": {"a": "CIFAR-100"}, "means": {"mean": "Avg"}}
    named = paper | {"where": {}, "values": {"top-1": "top1"}}
    for given, wanted in ((paper, None), (named, 94.0)):
        made = entries(table.build("x", SPEC | {"values": values, "paper": given}, runs()), "LoRA")
        assert made["a loss"].paper is None and made["mean loss"].paper is None
        assert (made["a top-1"].paper is None) == (wanted is None) == (made["mean top-1"].paper is None)


def test_latex_takes_no_label_for_its_own():
    cells = [{"targets": label, "seed": "0"} for label in ("[q,v]", "*", "<x|y>", "ε ≤ é")]
    tex = render.latex(table.build("x", {"rows": "targets", "values": SPEC["values"]}, Runs([], cells, {})))
    assert "\n{}[q,v] &" in tex and "\n{}* &" in tex and "$<$x$|$y$>$ &" in tex
    assert r"$\varepsilon$ $\leq$ ? &" in tex and tex.isascii()


def test_a_wide_table_is_folded():
    made = table.build("x", SPEC, runs())
    narrow = render.text(made, width=40).splitlines()
    assert max(map(len, narrow)) <= 40 and sum(line.startswith("LoRA") for line in narrow) > 1
    words = lambda text: sorted(w for w in text[: text.index("27 of 27 runs")].split() if w[-1].isdigit())  # noqa: E731
    assert words("\n".join(narrow)) == words(render.text(made))


def test_mixed_origins_are_one_line_of_warning():
    assert records.provenance(runs().records) is None
    place = lambda c: {  # noqa: E731
        "commit": ("b" if c["seed"] == "0" else "a") * 40,
        "device": f"gpu {c['seed']}",
        "versions": {"torch": "2.13.0", "timm": c["data.task"]},
    }
    (note,) = (n for n in table.build("x", SPEC, runs(environment=place)).notes if n.startswith("Warning"))
    assert "2 commits (aaaaaaa: 18, bbbbbbb: 9)" in note and "3 versions of timm" in note and "3 machines" in note
    assert "torch" not in note


@pytest.mark.parametrize("name", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("experiments/*/tab*.csv")))
def test_the_papers_means_follow_from_their_entries(name):
    """Every printed mean is its entries' rounded or cut, or has a correction that is."""
    lines = list(csv.DictReader((ROOT / name).open()))
    assert all(line["doubt"] for line in lines if line["corrected"])
    for mean in (line for line in lines if line["dataset"] == "Avg"):
        same = ("row", "section", "model", "compression", "peft")
        found = [x["value"] for x in lines if x["is_aggregate"] == "0" and all(x[k] == mean[k] for k in same)]
        exact = np.mean([float(value) for value in found])
        assert float(mean["corrected"] or mean["value"]) == pytest.approx(exact, abs=0.1 + 1e-9), mean
        assert not mean["corrected"] or abs(float(mean["value"]) - exact) > 0.1


def test_vtabs_group_means_are_read_too():
    paper = Paper({"file": "experiments/crisp/tab01_vtab_peft.csv", "means": {"n": "VTAB-1K/Natural mean"}})
    assert paper.mean("LoRA", "n", "top-1").value == 69.9 and paper.cell("CRISP", "VTAB-1K/SVHN", "top-1").value == 67.3


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
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
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
    names = {"runs.jsonl", "config.json", "table.md", "table.tex", "table.csv", "ranks.png", "losses.png", "memory.png"}
    assert {p.name for p in written} == names == {p.name for p in (here / "experiments/tiny").iterdir()}
    slim = records.lines(here / "experiments/tiny/runs.jsonl")[0]
    dense = next(r for n, r in results.items() if slim["method"]["name"] == r["method"]["name"])
    assert slim["layers"]["q"]["rank"] == [row["rank"] for row in dense["layers"] if row["role"] == "q"]
    assert len(slim["config"]) == 12 and "checkpoint" not in slim
    changed = Experiment("tiny", OmegaConf.create(given | {"data": {"limit": 32}}))
    found = report.build(changed).table
    assert found.done == 0 and "Left out: 2 of another configuration (data.limit=64 there, 32 here)." in found.notes[0]
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


# plots


def figure(given: dict, found: Runs | None = None):
    return plots.figures({"p": given}, found or runs())["p"]


def test_xy_averages_within_a_seed_and_then_over_the_seeds():
    """One run is missing: its seed does not count for that method, the others do."""
    found = runs(lambda c: c != {"method": "LoRA", "data.task": "b", "seed": "2"})
    ax = figure(
        {"kind": "xy", "x": "account.trained", "xlog": True, "y": "test.acc", "scale": 100, "point": "method"}, found
    ).axes[0]
    drawn = {tuple(np.round(c.lines[0].get_xydata()[0], 6)) for c in ax.containers}
    expected = {(10.0**i, round(100 * SCORES[i][:, : 3 if i else 2].mean(), 6)) for i in range(3)}
    assert drawn == expected and {t.get_text() for t in ax.texts} == set(METHODS)
    bar = ax.containers[0].lines[2][0].get_segments()[0]  # of LoRA: two seeds
    assert np.ptp(bar[:, 1]) / 2 == pytest.approx(100 * SCORES[0][:, :2].mean(0).std(ddof=1))


def test_xy_over_an_axis_joins_numbers_and_not_words():
    seeds = figure({"kind": "xy", "x": "seed", "y": "test.acc", "line": "method", "hline": {"chance": 0.1}}).axes[0]
    line = seeds.containers[1].lines[0]
    assert line.get_linestyle() == "-" and line.get_xdata().tolist() == [0, 1, 2]
    assert line.get_ydata() == pytest.approx(SCORES[1].mean(0)) and [t.get_text() for t in seeds.get_xticklabels()] == [
        "0",
        "1",
        "2",
    ]
    words = figure({"kind": "xy", "x": "method", "y": "test.acc", "line": "data.task"}).axes[0]
    assert words.containers[0].lines[0].get_linestyle() == "None"
    assert [t.get_text() for t in words.get_xticklabels()] == list(METHODS)


def test_ranks_by_layer_and_role():
    made = figure({"kind": "ranks", "y": "rank", "line": "method", "where": {"method": ["CERSA", "SVFit"]}})
    assert [ax.get_title() for ax in made.axes] == ["query", "attention output"]
    assert [list(line.get_ydata()) for line in made.axes[0].lines] == [[5.0, 7.0], [6.0, 8.0]]
    assert {len(ax.get_legend_handles_labels()[1]) for ax in made.axes} == {2}


def test_curves_have_the_seeds_spread():
    ax = figure({"kind": "curves", "y": "curves.train/loss", "line": "method"}).axes[0]
    assert ax.lines[0].get_ydata() == pytest.approx([3.0, 2.1, 1.0]) and len(ax.collections) == 3
    band = ax.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 2][:, 1].max() == pytest.approx(2.1 + np.std([0, 0.1, 0.2], ddof=1))


def test_bars_beside_their_reference():
    more = {"before": lambda c: 0.5, "after": lambda c: {"x": 0.4, "y": 0.3}}
    given = {
        "kind": "bars",
        "x": "value",
        "y": {"X": "after.x", "Y": "after.y"},
        "line": "method",
        "reference": "before",
    }
    ax = figure(given | {"scale": 100}, runs(**more)).axes[0]
    heights = sorted(patch.get_height() for patch in ax.patches)
    assert heights == pytest.approx([30] * 3 + [40] * 3 + [50] * 2)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["X", "Y"]


def test_heat_maps_share_one_scale():
    made = figure({"kind": "heat", "y": "similarity", "nines": True})
    image = made.axes[0].images[0]
    assert np.allclose(image.get_array(), [[1.0, 0.9], [0.99, 0.999]]) and made.axes[0].get_title() == "query"
    at = image.norm(np.array([0.9, 0.99, 0.999]))
    assert at[2] - at[1] == pytest.approx(at[1] - at[0], rel=1e-3)  # a nine more is a step further


def test_a_plot_without_numbers_is_left_out_and_a_wrong_one_refused():
    assert plots.figures({"p": {"kind": "xy", "x": "seed", "y": "test.f1"}}, runs()) == {}
    for given, why in (
        ({"kind": "pie", "y": "test.acc"}, "kind=pie: must be one of ranks, xy, curves, bars, heat"),
        ({"kind": "xy", "y": "test.acc"}, "needs x"),
        ({"kind": "ranks"}, "needs y"),
        ({"kind": "curves", "y": "curves.train/loss", "colour": "red"}, "colour: there is no such option"),
        ({"kind": "curves", "y": "curves.train/loss", "line": "role"}, "role is no axis; choose from method"),
        ({"kind": "bars", "x": "seed", "y": {"a": "test.acc"}}, "say which of x, line, panel or point"),
    ):
        with pytest.raises(UsageError, match=why):
            plots.figures({"p": given}, runs())
