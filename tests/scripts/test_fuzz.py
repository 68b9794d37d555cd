"""scripts/fuzz.py in short: random configurations end in one line or in a result, and it sees what does not."""

import importlib
import json
import random
import subprocess
import sys

import pytest

from helpers import ROOT


@pytest.fixture
def scripts(monkeypatch):
    """(fuzz, fuzz_cases), as modules."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("scripts.fuzz"), importlib.import_module("scripts.fuzz_cases")


def test_thirty_configurations():
    command = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), "--runs", "30"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "30 configurations" in told.stdout and "'refused'" in told.stdout and "'ran'" in told.stdout


def test_every_node_is_drawn_from(scripts):
    fuzz, cases = scripts
    drawn = {line.split("=")[0].lstrip("+") for n in range(300) for line in cases.case(random.Random(n)).arguments}
    nodes = {key.partition(".")[0] for key in drawn}
    assert {
        "seed",
        "optim",
        "trainer",
        "calibration",
        "analyse",
        "harness",
        "model",
        "data",
        "method",
        "stage",
    } <= nodes
    assert any(key.startswith("stage.distil.") for key in drawn) and any("mimicry." in key for key in drawn)


def test_bad_values_are_known_as_such(scripts):
    cases = scripts[1]
    from recombine.runtime.kinds import Count, Rate, Word

    for hint, text in ((Rate | None, "null"), (Rate, "0.5"), (Count, "3"), (Word, "80"), (tuple[Word, ...], "[a,b]")):
        assert cases.fits(hint, text), text
    for hint, text in ((Rate, "null"), (Rate, "inf"), (Count, "2.5"), (Count, "true"), (tuple[Word, ...], "abc")):
        assert not cases.fits(hint, text), text


def test_what_is_wrong_is_seen(scripts, tmp_path):
    fuzz, cases = scripts
    case, line = cases.Case(["optim.lr=-1"], ["optim.lr=-1"]), "run.py: optim.lr=-1: must be a number from 0\n"
    assert fuzz.verdict(case, 2, line, tmp_path) == ("refused", "")
    assert fuzz.verdict(case, 2, line * 2, tmp_path)[1].startswith("2 lines")
    assert "other lines" in fuzz.verdict(case, 2, "A library speaks\n" + line, tmp_path)[1]
    assert fuzz.verdict(case, 1, "Traceback (most recent call last)\nKeyError: 3", tmp_path) == ("trace", "KeyError: 3")
    assert "nonsense: optim.lr=-1" in fuzz.verdict(case, 0, "", tmp_path)[1]
    good = cases.Case([])
    assert fuzz.verdict(good, 0, "", tmp_path)[1] == "no result.json"
    (tmp_path / "out").mkdir()
    for score, why in ((0.5, ""), (float("inf"), "not finite: test.acc=inf"), (None, "not finite: test.acc=None")):
        (tmp_path / "out" / "result.json").write_text(json.dumps({"test": {"acc": score}}))
        assert fuzz.verdict(good, 0, "", tmp_path)[1] == why
    assert fuzz.verdict(good, "hang", "", tmp_path)[0] == "hang"
