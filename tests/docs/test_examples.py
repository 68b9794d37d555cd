"""Every script of examples/ runs, with a few training steps."""

import importlib
import sys

import pytest

from helpers import ROOT

EXAMPLES = ROOT / "examples"
STEPS = {
    "compress_and_adapt": {"pretrain": 120, "adapt": 2},
    "calibrate": {"pretrain": 120, "batches": 2},
    "own_method": {"pretrain": 120, "adapt": 2},
}


def test_every_example_is_run():
    assert STEPS.keys() == {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}


@pytest.mark.parametrize("name", STEPS)
def test_example(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    try:
        found = importlib.import_module(name).main(**STEPS[name])
    finally:
        for module in (name, "digits"):
            sys.modules.pop(module, None)
    learnt, *rest = found.values()
    assert learnt > 0.15  # ten classes: what the model learnt is more than chance
    assert len(rest) >= 3 and all(0 <= accuracy <= 1 for accuracy in rest)
    if "merged" in found:
        assert found["merged"] == list(found.values())[-2]
    shown = capsys.readouterr().out
    assert all(f"{key} " in shown for key in found)
