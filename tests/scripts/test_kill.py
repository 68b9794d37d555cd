"""scripts/kill.py in short: what is killed and started again ends as what was left alone."""

import importlib
import json
import subprocess
import sys

from helpers import ROOT


def test_a_few_trials_of_every_kind():
    command = [sys.executable, str(ROOT / "scripts" / "kill.py"), "--trials", "8", "--seed", "1"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    heads, *rows = (line.split("  ") for line in told.stdout.splitlines())
    heads, *rows = ([cell.strip() for cell in row if cell] for row in (heads, *rows))
    counts = {row[0]: dict(zip(heads[1:], map(int, row[1:]), strict=True)) for row in rows}
    assert counts.keys() == {"adapt", "joint", "ranks", "sweep", "all"}
    assert counts["all"]["identical"] == 8 and counts["all"]["not"] == 0 and counts["all"]["hit"] >= 4


def test_it_sees_what_differs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the script sets it
    monkeypatch.syspath_prepend(ROOT / "scripts")
    kill = importlib.import_module("kill")

    def store(name: str, weights: bytes = b"w", **changed):
        result = {"seed": 0, "config": {"trainer": {"checkpoint_minutes": name}}, "seconds": {"total": name}}
        result |= {"val": {"acc": 0.5}, "curves": {"train/acc": [0.1]}, "distil": {"val_loss": 1.0, "curves": {}}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result | changed))
        (tmp_path / name / "best.safetensors").write_bytes(weights)
        return tmp_path / name

    whole = store("whole")
    assert kill.differences(whole, store("same")) == []
    assert kill.differences(whole, store("curve", curves={"train/acc": [0.2]})) == ["curves"]
    assert kill.differences(whole, store("distilled", distil={"val_loss": 1.0, "curves": {"a": [1]}})) == ["curves"]
    assert kill.differences(whole, store("score", val={"acc": 0.6})) == ["scores"]
    assert kill.differences(whole, store("weights", b"v", stage="adapt")) == ["rest", "sha256"]
    assert kill.differences(whole, tmp_path / "nothing") == ["results of the seeds [0] and []"]
