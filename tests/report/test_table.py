"""Tables of results: means, deviations, and what is missing."""

import csv
import io

import pytest

from helpers.report_runs import METHODS, SCORES, SPEC, TAB07, TASKS, entries, runs
from recombine.errors import UsageError
from recombine.report import records, render, table, table_data
from recombine.report.records import Runs


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
