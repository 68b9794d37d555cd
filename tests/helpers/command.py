"""Short runs on a tiny ViT in this process, and the memory of one in its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

import run
from helpers import CONF, ROOT, TINY
from recombine.runner import ranks

CHUNK = "method.chunk=16"


def config(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*TINY, *overrides])


def execute(folder, *overrides) -> dict:
    ranks.main(config(*overrides), folder)
    return json.loads((folder / "result.json").read_text())


def line(capsys, monkeypatch, tmp_path, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["run.py", f"hydra.run.dir={tmp_path}/out", *TINY, *arguments])
    monkeypatch.setattr(run, "DEBUG", False)
    assert run.cli() == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.strip() and "img/s" not in text]
    err = [text for text in told if not text.startswith("note: ")]  # said before the run got so far
    assert len(err) == 1 and err[0].startswith("run.py: "), err
    assert not (tmp_path / "out" / "result.json").exists()
    return err[0]


def own_peak(folder: Path, given: list[str]) -> int:
    """Bytes that a run holds at most beside its imports, in a process of its own with one thread."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "helpers.peak", str(folder), *given]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.rpartition("own ")[2])
