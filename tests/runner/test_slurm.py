"""A real Slurm (scripts/local_slurm.sh), one machine as two nodes: sweeps, dead jobs, ranks, and the queue again."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from helpers import CONF, ROOT
from helpers.waiting import until
from recombine.runner import ranks

TOOL = str(ROOT / "scripts" / "local_slurm.sh")
TINY = [
    *("model=tiny_vit", "trainer=cpu", "trainer.progress=false", "data.limit=32", "data.batch_size=8", "probe=false"),
    *("trainer.epochs=2", "method=lora", "method.rank=4"),
]
STARTED: list[subprocess.Popen] = []
QUEUE = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture(scope="module")
def slurm():
    """The environment of a shell that talks to it."""
    if missing := [name for name in ("slurmctld", "slurmd", "munged", "squeue") if shutil.which(name) is None]:
        pytest.skip(f"no Slurm on this machine ({', '.join(missing)} not found): sudo scripts/local_slurm.sh install")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's folders are closed to others, munge's must not be
    folder.chmod(0o755)
    two = os.environ | {"LOCAL_SLURM_CPUS": "4", "LOCAL_SLURM_NODES": "2"}
    started = subprocess.run([TOOL, "start", folder], capture_output=True, text=True, env=two)
    if started.returncode:
        pytest.skip(f"Slurm does not start on this machine: {started.stderr.strip().splitlines()[-1]}")
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    yield environment
    for launcher in STARTED:  # of a test that failed
        launcher.kill()
    subprocess.run([TOOL, "stop", folder], check=True, env=environment)
    shutil.rmtree(folder)


def sweep(slurm: dict, folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run.py"), "-m", *TINY, *QUEUE, f"hydra.sweep.dir={folder}", *overrides]
    STARTED.append(subprocess.Popen(command, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return STARTED[-1]


def job(folder: Path, index: int) -> str | None:
    """The id of that job of a sweep's array once it has been submitted."""
    found = list((folder / ".submitit").glob(f"*_{index}"))
    return found[0].name if found else None


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def alone(folder: Path, *overrides: str) -> dict:
    """The same run in this process."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ranks.main(compose("config", [*TINY, *overrides]), folder)
    return result(folder)


@pytest.mark.slurm
def test_a_sweep_of_which_one_job_is_killed(slurm, tmp_path):
    """The third of four jobs is sent SIGKILL in its work: the others' results are there, and it is named."""
    folder = tmp_path / "sweep"
    running = sweep(slurm, folder, "seed=0,1,2,3", "trainer.checkpoint_minutes=0")
    until(lambda: job(folder, 2))
    until(lambda: "RUNNING" in squeue(slurm, job(folder, 2)))
    subprocess.run(["scancel", "--signal=KILL", "--full", job(folder, 2)], env=slurm, check=True)
    out, err = running.communicate()
    assert running.returncode == 2 and f"job {job(folder, 2)} died without a result" in out, out + err
    folders = {path.parent.name.split("seed=")[1][0]: path.parent for path in folder.glob("*/result.json")}
    assert sorted(folders) == ["0", "1", "3"] and "1 of 4 runs failed" in err
    again = sweep(slurm, folder, "seed=0,1,2,3", "trainer.checkpoint_minutes=0", "retry=true")
    out, err = again.communicate()
    assert again.returncode == 0 and "3 finished before" in out, out + err
    assert result(folders["0"])["test"] == alone(tmp_path / "alone", "seed=0")["test"]


@pytest.mark.slurm
@pytest.mark.parametrize("tasks", [1, 2])
def test_two_ranks(tasks, slurm, tmp_path):
    """Started by the run itself, as slurm_ddp has it, or by srun, as slurm_multinode."""
    folder = tmp_path / "sweep"
    running = sweep(
        slurm, folder, "trainer.devices=2", "trainer.strategy=ddp", f"hydra.launcher.tasks_per_node={tasks}"
    )
    out, err = running.communicate()
    assert running.returncode == 0, out + err
    (path,) = folder.glob("*/result.json")
    assert result(path.parent)["test"] == pytest.approx(alone(tmp_path / "alone")["test"], rel=1e-4)


@pytest.mark.slurm
def test_two_nodes(slurm, tmp_path):
    """srun starts a rank on either node, as slurm_multinode has it: together they are one process."""
    folder = tmp_path / "sweep"
    words = ["hydra.launcher.nodes=2", "hydra.launcher.srun_args=['--kill-on-bad-exit=1','--wait=60']"]
    running = sweep(slurm, folder, "trainer.devices=1", "trainer.num_nodes=2", "trainer.strategy=ddp", *words)
    out, err = running.communicate()
    assert running.returncode == 0, out + err
    (submitted,) = folder.glob(".submitit/*/*_submitted.pkl")
    logs = list(Path(slurm["SLURM_CONF"]).parent.glob("log/slurmd-*.log"))
    started = [f"launch task StepId={submitted.parent.name}.0 " in log.read_text() for log in logs]
    assert started == [True, True]
    (path,) = folder.glob("*/result.json")
    assert result(path.parent)["config"]["trainer"]["num_nodes"] == 2
    assert result(path.parent)["test"] == pytest.approx(alone(tmp_path / "alone")["test"], rel=1e-4)


@pytest.mark.slurm
def test_announced_end_puts_the_job_into_the_queue_again(slurm, tmp_path):
    """SIGUSR2, as Slurm sends before the time is up: the state is kept, the job comes again, and ends as if nothing
    had happened."""
    folder, words = tmp_path / "sweep", ["trainer.epochs=60", "hydra.launcher.timeout_min=5"]
    running = sweep(slurm, folder, *words)
    until(lambda: list(folder.rglob("best-*.ckpt")))
    (submitted,) = folder.glob(".submitit/*/*_submitted.pkl")  # one job is no array
    subprocess.run(["scancel", "--signal=USR2", submitted.parent.name], env=slurm, check=True)
    out, err = running.communicate()
    assert running.returncode == 0, out + err
    logs = "".join(path.read_text() for path in folder.rglob("*_log.*"))
    assert "stopped by SIGUSR2 at step" in logs
    (path,) = folder.glob("*/result.json")
    expected = alone(tmp_path / "alone", "trainer.epochs=60")
    assert result(path.parent)["test"] == expected["test"] and result(path.parent)["curves"] == expected["curves"]


def squeue(slurm: dict, name: str) -> str:
    return subprocess.run(["squeue", "-h", "-o", "%T", "-j", name], env=slurm, capture_output=True, text=True).stdout
