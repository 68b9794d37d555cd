"""Sweeps of real runs: finished runs stay, a killed one takes no other with it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.waiting import LIMIT, children, until
from recombine import results
from recombine.runner import sweep_table
from recombine.runtime.naming import run_folder

TINY = [
    *("model=tiny_vit", "trainer=cpu", "trainer.progress=false", "trainer.epochs=1", "data.limit=64", "probe=false"),
    *("method=linear_probe", "hydra.mode=MULTIRUN"),
]
WAITING = ["method._target_=helpers.waiting.WaitingProbe", "data.batch_size=16", "trainer.checkpoint_minutes=0"]


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "run.py", *TINY, f"hydra.sweep.dir={folder}", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)


def sweep(folder: Path, *overrides: str) -> tuple[int, str]:
    process = start(folder, *overrides)
    out, _ = process.communicate(timeout=LIMIT)
    return process.returncode, out


def test_a_sweep_skips_what_is_finished_and_retries_what_failed_on_request(tmp_path):
    args, why = (
        ["method=svd", "method.rank=4,9999"],
        "method.rank=9999: must be from 1 to 48, the widest target layer",
    )
    code, out = sweep(tmp_path, *args)
    assert code == 2 and "[1 done, 1 failed, 0 left]" in out and out.count(why) == 1
    assert re.search(r"^4  1 +\d+\.\d %  test accuracy  [\d,]+ +\d+\.\d %$", out, re.MULTILINE)
    assert out.splitlines()[-1] == "run.py: 1 of 2 runs failed; retry=true runs them again"
    (result,) = tmp_path.glob("*/result.json")
    before = result.read_bytes(), result.stat().st_mtime_ns
    code, out = sweep(tmp_path, *args)
    assert (
        code == 2 and "1 finished before, 1 failed before (retry=true runs them again)" in out and out.count(why) == 1
    )
    assert "left]" not in out  # nothing ran
    code, out = sweep(tmp_path, *args, "retry=true")
    assert code == 2 and "[1 done, 1 failed, 0 left]" in out
    assert (result.read_bytes(), result.stat().st_mtime_ns) == before
    # a folder tells runs apart by what the command line says; another default is noticed
    record = json.loads(result.read_text())
    result.write_text(json.dumps(record | {"config": record["config"] | {"seed": 7}}))
    code, out = sweep(tmp_path, *args)
    assert code == 2 and "is the result of another configuration (seed=7 there, 0 here)" in out
    assert "1 failed before (retry=true runs them again), 1 refused" in out
    result.write_bytes(b"")  # as a machine leaves it whose power went
    code, out = sweep(tmp_path, *args, "retry=true")
    assert code == 2 and "not a readable result.json" in out and "move it away" in out


def test_the_table_of_an_experiment_names_the_report_with_what_was_typed():
    typed = ["experiment=cersa/tab09", "only=[CERSA]", "hydra.launcher.jobs=2", "trainer.epochs=1"]
    said = sweep_table.report(typed)
    assert said == ["beside the paper's: python -m recombine.report cersa/tab09 'only=[CERSA]' trainer.epochs=1"]
    assert sweep_table.report(typed[1:]) == []


def gates(folder: Path, shut: str, names: str) -> tuple[list[Path], str]:
    """Files that runs wait at, those of the names in `shut`, and what gives each run of a sweep its own."""
    folder.mkdir()
    for name in shut:
        (folder / name).touch()
    return [folder / name for name in shut], "+method.shut=" + ",".join(str(folder / name) for name in names)


def test_a_killed_run_takes_no_other_with_it(tmp_path):
    (gate,), own = gates(tmp_path / "gates", "b", "abc")
    process = start(tmp_path / "sweep", *WAITING, own)
    until(Path(f"{gate}.reached").is_file, process)
    (worker,) = children(process.pid, "spawn_main")
    os.kill(worker, signal.SIGKILL)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 2 and "[2 done, 1 failed, 0 left]" in out
    (failed,) = tmp_path.rglob("failed.txt")
    assert failed.read_text() == "killed by signal 9\n" and not (failed.parent / "result.json").exists()
    gate.unlink()
    code, out = sweep(tmp_path / "sweep", *WAITING, own, "retry=true", "hydra.launcher.jobs=2")
    assert code == 0 and "2 finished before" in out and "[3 done, 0 failed, 0 left]" in out
    assert len(list(tmp_path.rglob("result.json"))) == 3 and not list(tmp_path.rglob("failed.txt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_told_to_stop_leaves_no_worker_and_goes_on(number, tmp_path):
    shut, own = gates(tmp_path / "gates", "ab", "ab")
    given = [*WAITING, own, "+method.steps=1", "hydra.launcher.jobs=2"]
    process = start(tmp_path / "sweep", *given)
    until(lambda: all(Path(f"{gate}.reached").is_file() for gate in shut), process)
    working, folders = children(process.pid, "spawn_main"), {path.parents[2] for path in tmp_path.rglob("best-*.ckpt")}
    assert len(working) == 2 == len(folders) and all(map(results.running, folders))
    process.send_signal(number)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + number and "Traceback" not in out
    if number == signal.SIGINT:
        assert out.splitlines()[-1] == "run.py: stopped; the same command with the same folder goes on"
    assert not any(Path(f"/proc/{pid}").exists() for pid in working) and not list(tmp_path.rglob("failed.txt"))
    assert not any(map(results.running, folders))
    for gate in shut:
        gate.unlink()
    code, out = sweep(tmp_path / "sweep", *given)
    assert code == 0 and "[2 done, 0 failed, 0 left]" in out


def test_a_run_that_another_process_works_on_has_not_failed(tmp_path):
    folder = tmp_path / run_folder([*TINY[:-1], "seed=0"])
    with results.lock_folder(folder):
        code, out = sweep(tmp_path, "seed=0")
    assert code == 2 and "another process runs here" in out and not (folder / "failed.txt").exists()
    assert out.splitlines()[-1] == "run.py: 1 of 1 runs failed"
    code, _ = sweep(tmp_path, "seed=0")
    assert code == 0


def test_a_cell_whose_folder_cannot_be_fails_alone(tmp_path):
    (tmp_path / run_folder([*TINY[:-1], "seed=0"])).touch()
    code, out = sweep(tmp_path, "seed=0,1")
    assert code == 2 and "[1 done, 1 failed, 0 left]" in out and "Traceback" not in out
    assert "log.txt: cannot be written (File exists)" in out and "failed.txt: cannot be written" in out


def test_a_search_lives_with_trials_that_miss_the_budget(tmp_path):
    pytest.importorskip("optuna")
    space = ["method=svd", "method.targets=choice([q,v],[o])", "budget=choice(retained_0.0001,retained_50)"]
    code, out = sweep(tmp_path, "hydra/sweeper=search", "hydra.sweeper.n_trials=4", *space)
    assert code == 0, out
    best = (tmp_path / "optimization_results.yaml").read_text()
    assert "budget: retained_50" in best and "cannot be met, the nearest that svd can is" in out
    space[-1] = "budget=retained_0.0001"
    code, out = sweep(tmp_path / "none", "hydra/sweeper=search", "hydra.sweeper.n_trials=1", *space)
    assert code == 2 and "run.py: hydra/sweeper=search: No trials are completed yet." in out.splitlines()[-1]
