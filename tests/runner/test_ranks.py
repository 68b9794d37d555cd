"""Two ranks on gloo: the same weights and scores as one, one run or a sweep, and one end for both."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.ranked import TINY, execute, same
from helpers.waiting import LIMIT, Waits, children, until
from recombine.errors import UsageError
from recombine.methods.adapters.ssf import Ssf
from recombine.methods.crisp.method import Crisp
from recombine.runner import ranks
from recombine.training import distributed

JOINT = ["stage=joint", "budget=retained_50", "method=crisp", "method.chunk=16", "stage.distil.epochs=1"]
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]


def command(*overrides: str, flags: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *flags, *TINY, *overrides]


@pytest.fixture(scope="module")
def joint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("joint") / "one"
    execute(folder, *JOINT)
    return folder


@dataclass(kw_only=True)
class WaitingCrisp(Waits, Crisp):
    """CRISP that can be made to wait in a step."""


def test_two_ranks_are_one(joint, tmp_path):
    """Killed on the way and started again, at that: nothing of the ranks outlives the process that started them."""
    (gate := tmp_path / "gate").touch()
    waiting = [f"method._target_={__name__}.WaitingCrisp", f"+method.shut={gate}", "+method.steps=10"]
    words = command(*JOINT, *TWO, *waiting, f"hydra.run.dir={tmp_path}/run")
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{ROOT / 'tests'}"}
    whole = subprocess.Popen(words, stderr=subprocess.DEVNULL, env=environment)
    until(Path(f"{gate}.reached").is_file, whole)
    assert list(tmp_path.rglob("best-*.ckpt"))  # in its second epoch
    ranks = children(whole.pid)
    assert len(ranks) == 2
    whole.kill()
    whole.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    gate.unlink()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment)
    same(joint, tmp_path / "run")
    assert "distil" in json.loads((tmp_path / "run" / "result.json").read_text())
    assert not (tmp_path / "run" / ".state").exists() and not (tmp_path / "run" / ".ranks").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_told_to_stop_two_ranks_leave_one_state(tmp_path, number, code):
    """Lightning's own handler would have one rank wait for the other for ever. A terminal's Ctrl-C goes to all."""
    long = ["method=lora", "method.rank=4", "probe=false", "trainer.epochs=900", f"hydra.run.dir={tmp_path}"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    told = subprocess.Popen(command(*long, *TWO), **pipes)
    until(lambda: list(tmp_path.rglob("best-*.ckpt")), told)
    os.killpg(told.pid, number)
    said = told.communicate(timeout=LIMIT)[1]
    assert told.returncode == code and "Traceback" not in said
    step = int(re.search(rf"stopped by {number.name} at step (\d+) of best", said)[1])
    assert list(tmp_path.rglob(f"best-{step:08}-*.ckpt")) and not list(tmp_path.rglob("result.json"))


def test_a_sweep_of_runs_on_two_ranks_each(tmp_path):
    """In Lightning's own way each second rank would repeat the whole sweep."""
    words = ["method=lora", "method.rank=4", "+method.options.use_rslora=true", "probe=false", "trainer.epochs=1"]
    given = [f"hydra.sweep.dir={tmp_path}/sweep", "seed=0,1"]
    subprocess.run(command(*words, *TWO, *given, flags=("-m",)), check=True, stdout=subprocess.DEVNULL)
    results = sorted((tmp_path / "sweep").rglob("result.json"))
    assert [json.loads(path.read_text())["seed"] for path in results] == [0, 1]
    assert [json.loads(path.read_text())["method"]["label"] for path in results] == ["lora", "lora"]
    for seed, path in enumerate(results):
        execute(tmp_path / str(seed), *words, f"seed={seed}")
        same(tmp_path / str(seed), path.parent)


@dataclass(kw_only=True)
class Fails(Ssf):
    """SSF that fails in one rank only."""

    def penalty(self, model) -> float:
        if distributed.rank() == 1:
            raise RuntimeError("the second rank has a bad day")
        return 0.0


def test_an_error_in_one_rank_is_one_line_and_ends_both(tmp_path):
    with pytest.raises(UsageError) as caught:
        execute(tmp_path, "method=ssf", "probe=false", f"method._target_={__name__}.Fails", *TWO)
    line = str(caught.value)
    assert "rank 1 of 2: RuntimeError: the second rank has a bad day" in line and "\n" not in line
    assert "in penalty" in (tmp_path / ".ranks" / "trace.txt").read_text()
    left = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in children(os.getpid(), str(tmp_path))}
    assert not left


def test_a_killed_rank_is_named():
    codes = [1, -signal.SIGKILL]
    with pytest.raises(UsageError, match="rank 1 of 2 was killed by SIGKILL"):
        ranks.collect_results(Path("/nowhere"), codes)


def test_several_machines_need_a_launcher(tmp_path):
    with pytest.raises(UsageError, match="trainer.num_nodes=2.*slurm_multinode"):
        execute(tmp_path, *TWO, "trainer.num_nodes=2")


SHARDS = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
SHARDS += ["trainer.progress=false", "trainer.epochs=2", "trainer.checkpoint_minutes=0"]


def rank_of_two(rank: int, port: int, folder: Path, words: list[str]) -> None:
    """A rank's life, in a process that was forked."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), distributed.REPORT: str(folder / f"rank{rank}.json")}
    execute(folder, *words)
    distributed.destroy_group()


def forked(folder: Path, *words: str) -> list[multiprocessing.Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_of_two, args=(rank, port, folder, [*words])) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def test_two_ranks_in_shards_are_one(tmp_path):
    """Lightning's own path, killed on the way and started again: weights and moments come back into shards."""
    words = ["method=crisp", "method.chunk=16", "probe=false", "trainer.accumulate=2"]
    execute(tmp_path / "one", *words)
    (gate := tmp_path / "gate").touch()
    words += [f"method._target_={__name__}.WaitingCrisp", f"+method.shut={gate}", "+method.steps=8", *SHARDS]
    killed = forked(tmp_path / "two", *words)
    until(lambda: Path(f"{gate}.reached").is_file() or not all(process.is_alive() for process in killed))
    assert list((tmp_path / "two").rglob("best-*.ckpt"))  # in its second epoch
    for process in killed:
        process.kill()
        process.join()
    gate.unlink()
    again = forked(tmp_path / "two", *words)
    for process in again:
        process.join()
    assert [process.exitcode for process in again] == [0, 0]
    same(tmp_path / "one", tmp_path / "two")
