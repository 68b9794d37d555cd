"""The papers' numbers beside ours."""

import csv
import itertools

import numpy as np
import pytest

from helpers import ROOT
from helpers.report_runs import METHODS, SPEC, TAB07, entries, runs
from recombine.report import render, table
from recombine.report.paper import Paper


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
    assert any(f"a {same} of 3, by chance 1.5 ± 1.0" in note for note in made.notes)
    assert "No pair of a or b or mean is called clear: the test set's share of the error is not known." in made.notes
    clear = {"LoRA": 0.7, "CERSA": 0.8, "SVFit": 0.9}  # the other way round
    other = table.build(
        "x",
        SPEC | {"paper": paper},
        runs(test=lambda c: {"acc": clear[c["method"]]}, data=lambda c: {"sizes": {"test": 10_000}}),
    )
    wrong = "(clearly not: CERSA over LoRA, SVFit over LoRA, SVFit over CERSA)"
    assert any(f"a 0 of 3, by chance 1.5 ± 1.0 {wrong}" in note for note in other.notes)
    assert not any("is called clear" in note for note in other.notes)
    assert f"94.9 ({found['a'].difference:+.1f})".replace("-", "−") in render.text(made)
    ordered = table.build("x", SPEC | {"paper": paper | {"compare": "order"}}, runs())
    assert "94.9 (" not in render.text(ordered) and "94.9" in render.text(ordered)


def test_one_value_does_not_get_the_papers_number_of_another():
    values = SPEC["values"] | {"loss": {"key": "curves.x"}}
    paper = {"file": TAB07, "where": {"metric": "top1"}, "columns": {"a": "CIFAR-100"}, "means": {"mean": "Avg"}}
    named = paper | {"where": {}, "values": {"top-1": "top1"}}
    for given, wanted in ((paper, None), (named, 94.0)):
        made = entries(table.build("x", SPEC | {"values": values, "paper": given}, runs()), "LoRA")
        assert made["a loss"].paper is None and made["mean loss"].paper is None
        assert (made["a top-1"].paper is None) == (wanted is None) == (made["mean top-1"].paper is None)


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
