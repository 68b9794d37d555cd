"""Grids, and sweeps of real runs on a tiny ViT: finished runs stay, a killed one takes no other with it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from recombine import results
from recombine.errors import UsageError
from recombine.runner import grid
from recombine.runtime.naming import run_folder, run_name

ROOT = Path(__file__).parents[1]
TINY = [
    *("model=tiny_vit", "trainer=cpu", "trainer.progress=false", "trainer.epochs=1", "data.limit=64", "probe=false"),
    *("method=linear_probe", "hydra.mode=MULTIRUN"),
]
GRID = {
    "method": {"LoRA": {"method": "lora", "method.rank": 4}, "CERSA (α = 0.9)": {"method": "cersa"}},
    "data.task": ["a", "b"],
    "seed": [0, 1],
}


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "run.py", *TINY, f"hydra.sweep.dir={folder}", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def sweep(folder: Path, *overrides: str) -> tuple[int, str]:
    process = start(folder, *overrides)
    return process.wait(timeout=300), process.stdout.read()


def test_a_grid_is_the_product_of_its_axes_with_the_last_axis_slowest():
    cells = grid.cells(GRID)
    assert len(cells) == 8 and [c.labels["seed"] for c in cells] == ["0"] * 4 + ["1"] * 4
    assert cells[0].labels == {"method": "LoRA", "data.task": "a", "seed": "0"}
    assert cells[0].overrides == ("method=lora", "method.rank=4", "data.task=a", "seed=0")
    assert len({c.folder for c in cells}) == 8


def test_the_command_line_narrows_a_grid():
    assert {c.labels["seed"] for c in grid.cells(GRID, ["seed=7,8"])} == {"7", "8"}
    assert len(grid.cells(GRID, ["seed=0", "trainer.epochs=3"])) == 4
    assert all("trainer.epochs=3" in c.overrides for c in grid.cells(GRID, ["trainer.epochs=3"]))
    assert {c.labels["seed"] for c in grid.cells(GRID, ["++seed=5"])} == {"5"}
    assert all("~data.limit" in c.overrides for c in grid.cells(GRID, ["~data.limit"]))
    kept = grid.cells(GRID, only=["CERSA (α = 0.9)", "b"])
    assert [list(c.labels.values()) for c in kept] == [["CERSA (α = 0.9)", "b", "0"], ["CERSA (α = 0.9)", "b", "1"]]
    # a narrowed grid has the folders of the whole one
    assert {c.folder for c in grid.cells(GRID, ["seed=0"])} < {c.folder for c in grid.cells(GRID)}


@pytest.mark.parametrize("axes, overrides, only, why", [
    (GRID, ["method=svd"], None, r"method=svd: the labels of grid.method set method; choose some of them with only"),
    (GRID, [], ["LoRa"], r"only=LoRa: no axis of the grid has this label; they are LoRA, CERSA"),
    ({"seed": []}, [], None, r"grid.seed=\[\]: must be a list of values, or labels"),
    ({"x": {"A": {"seed": 1}, "B": {"seed": 1}}}, [], None, r"grid: two cells are seed=1; their overrides must differ"),
    ({}, ["optim.lr=interval(0,1)"], None, r"optim.lr=interval\(0,1\): a grid takes lists of values"),
])  # fmt: skip
def test_bad_grids_are_one_line(axes, overrides, only, why):
    with pytest.raises(UsageError, match=why):
        grid.cells(axes, overrides, only)


@pytest.mark.parametrize(
    "value", ["a", 1, -2.5, 1e-4, True, None, "α = 0.9", "it's", "a,b", [1, "x y"], {"a": [1]}, ""]
)
def test_overrides_say_what_the_yaml_said(value):
    parsed = OverridesParser.create().parse_override(f"key={grid.quoted(value)}").value()
    assert str(parsed) == str(value) if isinstance(value, list | dict) else parsed == value


def test_run_folders_do_not_collide():
    assert run_name("method.energy=0.9") != run_name("method.energy=0.95") and run_name("") == "default"
    long = [run_name("x=" + "1" * 200 + end) for end in "ab"]
    assert long[0] != long[1] and max(map(len, long)) <= 120
    assert "/" not in run_name("data.root=/a/b") and run_name("data.root=a/b") != run_name("data.root=a_b")
    assert run_folder(["b=1", "a=2"]) == run_folder(["a=2", "b=1", "experiment=x", "logger.mode=offline", "+only=[a]"])


def test_a_sweep_skips_what_is_finished_and_retries_what_failed_on_request(tmp_path):
    args, why = (
        ["method=svd", "method.rank=4,9999"],
        "method.rank=9999: must be from 1 to 48, the narrowest target layer",
    )
    code, out = sweep(tmp_path, *args)
    assert code == 2 and "[1 done, 1 failed, 0 left]" in out and out.count(why) == 2  # when it fails, and in the end
    assert out.splitlines()[-1] == "run.py: 1 of 2 runs failed; retry=true runs them again"
    (result,) = tmp_path.glob("*/result.json")
    before = result.read_bytes(), result.stat().st_mtime_ns
    code, out = sweep(tmp_path, *args)
    assert code == 2 and "1 finished before, 1 failed before (retry=true runs them again)" in out and why in out
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


def test_other_configurations_are_told_apart():
    one = {"method": {"rank": 4}, "calibration": {"data": {"name": None}}, "trainer": {"devices": 1}}
    assert results.config_difference(one, one | {"trainer": {"devices": 2}, "new": 1}) is None
    assert results.config_difference(one, one | {"method": {"rank": 8}}) == "method.rank=4 there, 8 here"
    pair = one | {"compressor": {"rank": 2}}
    assert results.config_difference(one, pair) == "compressor=None there, compressor.rank=2 here"
    assert results.config_difference(pair, one) == "compressor.rank=2 there, compressor=None here"
    text = one | {"calibration": {"data": "text"}}
    assert results.config_difference(text, one) == "calibration.data=text there, calibration.data.name=None here"


def test_a_score_that_is_no_number_does_not_lose_the_result(tmp_path):
    whole = {"config": {}, "metric": "acc", "val": {"acc": float("nan")}, "test": {"loss": float("inf"), "acc": 0.5}}
    found = results.read(results.write(tmp_path / "result.json", whole))
    assert found["val"] == {"acc": None} and found["test"] == {"loss": None, "acc": 0.5}
    assert math.isnan(results.score(found))


def test_a_search_lives_with_trials_that_miss_the_budget(tmp_path):
    pytest.importorskip("optuna")
    space = ["method=svd", "method.targets=choice([q,v],[o])", "budget=retained", "budget.value=choice(1e-6,0.5)"]
    code, out = sweep(tmp_path, "hydra/sweeper=search", "hydra.sweeper.n_trials=4", *space)
    assert code == 0, out
    best = (tmp_path / "optimization_results.yaml").read_text()
    assert "budget.value: 0.5" in best and "cannot be met, the nearest that svd can is" in out
    space[-1] = "budget.value=1e-6"
    code, out = sweep(tmp_path / "none", "hydra/sweeper=search", "hydra.sweeper.n_trials=1", *space)
    assert code == 2 and "run.py: hydra/sweeper=search: No trials are completed yet." in out.splitlines()[-1]
