"""A run on several devices: one process (rank) for each, which the run starts itself, and which end together.

`launch` starts the ranks on this machine, each of which repeats the run from its saved configuration; the process that
was called only waits, so nothing of the group is left in it for the next run of a sweep. Under srun or torchrun the
ranks are there already. Every rank computes the same run; only the first writes. What may come out differently (a
factorisation, a budget) the first rank computes, and the others load it from the state folder (resume.py).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf

from recombine.errors import EXPECTED, UsageError, one_line

REPORT = "RECOMBINE_RANK_REPORT"  # where a rank that `launch` started says how it ended
GRACE = 10.0  # seconds in which ranks may end by themselves once one has
group = None  # of the ranks, without a time limit: the first may factorise for hours


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until every rank is here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(group)


def highest(value: int, device: torch.device) -> int:
    """The largest value that a rank gives."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    dist.all_reduce(all_of := torch.tensor(value, device=device), dist.ReduceOp.MAX)
    return int(all_of)


def cluster():
    """How ranks find each other; who starts them."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if REPORT not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        return SLURMEnvironment(auto_requeue=False)  # submitit does that: recombine/training/resume.py
    return LightningEnvironment()


def join(trainer) -> None:
    """Makes this process a rank of the trainer's group, where there is one."""
    global group
    trainer.strategy.setup_environment()
    if dist.is_initialized() and dist.get_world_size() > 1:
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))


def leave() -> None:
    global group
    if dist.is_initialized():
        dist.destroy_process_group()
    group = None


@contextmanager
def together(out: Path) -> Iterator[None]:
    """The part of a run in which its ranks need each other: an error of one is an error of all."""
    try:
        yield
    except Exception as error:
        if REPORT in os.environ or not dist.is_initialized() or dist.get_world_size() == 1:
            raise  # `launch` sees to it
        folder, me = out / ".ranks", rank()
        if me > 0:  # whoever started the ranks ends those that are left
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank{me}.json").write_text(json.dumps({"error": one_line(error)}))
            traceback.print_exc()
            time.sleep(GRACE)  # the first may have the same to say
            os._exit(1)
        if not isinstance(error, EXPECTED):
            time.sleep(1.0)
            for path in sorted(folder.glob("rank*.json")):
                raise UsageError(f"{path.stem}: {json.loads(path.read_text())['error']}") from error
        raise
    leave()


def to_start(trainer) -> int:
    """How many ranks the run has to start; 0: none, because it is one itself or needs only one."""
    if trainer.world_size == 1 or cluster().creates_processes_externally:
        return 0
    if trainer.num_nodes > 1:
        raise UsageError(
            f"trainer.num_nodes={trainer.num_nodes}: a run starts processes on its own machine only; "
            "set hydra/launcher=slurm_multinode, or start it with srun or torchrun"
        )
    return trainer.world_size


def launch(cfg: DictConfig, out: Path, count: int) -> float:
    """Runs the ranks and returns what the first one did. What the others print goes to rank1.log, ...

    Raises:
        UsageError: a rank failed; the others were ended.
    """
    from hydra.core.hydra_config import HydraConfig

    folder = out / ".ranks"
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    if HydraConfig.initialized():
        OmegaConf.save(HydraConfig.instance().cfg, folder / "hydra.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // count)),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    told: list[int] = []
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, _) -> None:
        told.append(number)
        for process in ranks:
            process.send_signal(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        for r in range(count):
            (report := folder / f"rank{r}.json").unlink(missing_ok=True)
            with nullcontext() if r == 0 else (out / f"rank{r}.log").open("a") as log:
                command = [sys.executable, "-m", "recombine.training.distributed", str(out)]
                env = common | {"LOCAL_RANK": str(r), REPORT: str(report)}
                ranks.append(  # the pipe closes when this process dies, however it dies
                    subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log)
                )
        codes = end_together(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            process.stdin.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if told:
        if told[0] == signal.SIGUSR2 and callable(handlers[told[0]]):
            handlers[told[0]](told[0], None)  # submitit's: queues the job again
        raise SystemExit(128 + told[0])
    return judge(folder, codes)


def end_together(ranks: list[subprocess.Popen]) -> list[int | None]:
    """Waits for all of them; once one has failed, not for long. Exit codes; None: it has to be killed."""
    failed = None
    while None in (codes := [process.poll() for process in ranks]):
        if failed is None and any(codes):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > GRACE:
            break
        time.sleep(0.05)
    return codes


def judge(folder: Path, codes: list[int | None]) -> float:
    """The first rank's value; or, where one failed, what went wrong first."""
    if not any(codes) and None not in codes:
        value = json.loads((folder / "rank0.json").read_text())["value"]
        shutil.rmtree(folder)
        return value
    reports = {r: json.loads(p.read_text()) for r in range(len(codes)) if (p := folder / f"rank{r}.json").is_file()}
    silent = [r for r, code in enumerate(codes) if code and "error" not in reports.get(r, {})]
    for r in sorted(silent, key=lambda r: codes[r]):  # killed ones first; the others only saw it leave
        how = f"was killed by {signal.Signals(-codes[r]).name}" if codes[r] < 0 else f"ended with exit code {codes[r]}"
        raise UsageError(f"rank {r} of {len(codes)} {how}, the others were ended")
    r = min((r for r in reports if "error" in reports[r]), key=lambda r: reports[r]["time"])
    if (trace := reports[r]["trace"]) is None:
        raise UsageError(reports[r]["error"])
    (path := folder / "trace.txt").write_text(trace)
    raise UsageError(f"rank {r} of {len(codes)}: {reports[r]['error']}; the trace is in {path}")


def main(out: Path) -> None:
    """One rank."""
    from hydra.core.hydra_config import HydraConfig

    import recombine.runtime.naming  # noqa: F401  resolvers
    from recombine.runner import pipeline

    threading.Thread(target=orphaned, daemon=True).start()
    folder, report = out / ".ranks", Path(os.environ[REPORT])
    if (folder / "hydra.yaml").is_file():
        HydraConfig.instance().cfg = OmegaConf.load(folder / "hydra.yaml")
    try:
        value = pipeline.main(OmegaConf.load(folder / "config.yaml"), out)
    except Exception as error:
        trace = None if isinstance(error, EXPECTED) else traceback.format_exc()
        report.write_text(json.dumps({"error": one_line(error), "trace": trace, "time": time.time()}))
        os._exit(1)  # a group that lost a rank may wait for it for ever
    report.write_text(json.dumps({"value": value}))
    leave()


def orphaned() -> None:
    """Ends this process when the one that started it is gone."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
