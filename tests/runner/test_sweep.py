"""Sweeps of real runs: finished runs stay, a killed one takes no other with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT
from recombine import results
from recombine.runtime.naming import run_folder

TINY = [
    *("model=tiny_vit", "trainer=cpu", "trainer.progress=false", "trainer.epochs=1", "data.limit=64", "probe=false"),
    *("method=linear_probe", "hydra.mode=MULTIRUN"),
]


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "run.py", *TINY, f"hydra.sweep.dir={folder}", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def sweep(folder: Path, *overrides: str) -> tuple[int, str]:
    process = start(folder, *overrides)
    return process.wait(timeout=300), process.stdout.read()


def test_a_sweep_skips_what_is_finished_and_retries_what_failed_on_request(tmp_path):
    args, why = (
        ["method=svd", "method.rank=4,9999"],
        "method.rank=9999: must be from 1 to 48, the narrowest target layer",
    )
    code, out = sweep(tmp_path, *args)
    assert code == 2 and "[1 done, 1 failed, 0 left]" in out and out.count(why) == 1
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


def workers(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(p) for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


def test_a_killed_run_takes_no_other_with_it(tmp_path):
    process = start(tmp_path, "seed=0,1,2")
    second = tmp_path / run_folder([*TINY[:-1], "seed=1"])
    while not (second / "log.txt").is_file():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    (worker,) = workers(process)
    os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=300) == 2
    assert "[2 done, 1 failed, 0 left]" in process.stdout.read()
    assert (second / "failed.txt").read_text() == "killed by signal 9\n" and not (second / "result.json").exists()
    code, out = sweep(tmp_path, "seed=0,1,2", "retry=true", "hydra.launcher.jobs=2")
    assert code == 0 and "2 finished before" in out and "[3 done, 0 failed, 0 left]" in out
    assert len(list(tmp_path.glob("*/result.json"))) == 3 and not list(tmp_path.glob("*/failed.txt"))


def test_a_sweep_that_is_told_to_stop_leaves_no_worker_and_goes_on(tmp_path):
    given = ["seed=0,1", "hydra.launcher.jobs=2", "trainer.epochs=50", "trainer.checkpoint_minutes=0"]
    process = start(tmp_path, *given)
    while len({path.parent for path in tmp_path.rglob("best-*.ckpt")}) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    working = workers(process)
    assert len(working) == 2 and results.running(next(tmp_path.glob("*seed=0*")))
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{pid}").exists() for pid in working) and not list(tmp_path.rglob("failed.txt"))
    assert not results.running(next(tmp_path.glob("*seed=0*")))
    code, out = sweep(tmp_path, *given)
    assert code == 0 and "[2 done, 0 failed, 0 left]" in out


def test_a_run_that_another_process_works_on_has_not_failed(tmp_path):
    folder = tmp_path / run_folder([*TINY[:-1], "seed=0"])
    with results.lock_folder(folder):
        code, out = sweep(tmp_path, "seed=0")
    assert code == 2 and "another process runs here" in out and not (folder / "failed.txt").exists()
    assert out.splitlines()[-1] == "run.py: 1 of 1 runs failed"
    code, _ = sweep(tmp_path, "seed=0")
    assert code == 0


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
