"""A run on its devices: one process (rank) for each, which are started here and end together.

`main` is what run.py and the launchers call. Where a run needs several ranks, `launch` starts them on this machine, and
each repeats the run from its saved configuration. The process that was called only waits, so nothing of the group is
left in it for the next run of a sweep. Under srun or torchrun the ranks are there already.
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
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.accelerators import CPUAccelerator
from omegaconf import DictConfig, OmegaConf

import recombine.runtime.naming  # noqa: F401  resolvers
from recombine import data, results
from recombine.errors import EXPECTED, UsageError, one_line
from recombine.runner import limits, pipeline, plan_table
from recombine.runtime.logs import quiet_libraries
from recombine.runtime.schema import typed
from recombine.runtime.threads import cores
from recombine.training import distributed
from recombine.training.settings import TrainerSettings
from recombine.training.trainer import build_trainer, require_possible

GRACE = 10.0  # seconds in which ranks may end by themselves once one has


def task(cfg: DictConfig) -> float:
    """What Hydra runs, once for each configuration."""
    return main(cfg, Path(HydraConfig.get().runtime.output_dir))


def main(cfg: DictConfig, out: Path) -> float:
    """Runs the stage on one task, or on a suite of them, and returns the (mean) validation score."""
    quiet_libraries()
    if cfg.get("plan") is not None:
        return plan_table.one(cfg, out)
    if cfg.data.task != "all" and HydraConfig.initialized():
        data.say_default_task(cfg.data.name, cfg.data.task, HydraConfig.get().overrides.task)
    settings = typed(TrainerSettings, OmegaConf.to_container(cfg.trainer, resolve=True), "trainer")
    require_possible(settings)
    if (settings.devices, settings.num_nodes, settings.strategy) != (1, 1, "auto"):
        limits.require_accelerator(settings.accelerator)  # a single process asks when it knows that it has to work
        trainer = build_trainer(settings, logger=False, enable_checkpointing=False)
        if count := to_start(trainer):
            return launch(cfg, out, count)
        distributed.init_group(trainer)
    with fail_together(out):
        return pipeline.run_suite(cfg, out) if cfg.data.task == "all" else results.score(pipeline.run_task(cfg, out))


@contextmanager
def fail_together(out: Path) -> Iterator[None]:
    """The part of a run in which its ranks need each other: an error of one is an error of all."""
    try:
        yield
    except Exception as error:
        if distributed.REPORT in os.environ or not distributed.several():
            raise  # `launch` sees to it
        folder, me = out / ".ranks", distributed.rank()
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
    distributed.destroy_group()


def to_start(trainer) -> int:
    """How many ranks the run has to start; 0: none, because it is one itself or needs only one."""
    if trainer.world_size == 1 or distributed.cluster().creates_processes_externally:
        return 0
    if trainer.num_nodes > 1:
        raise UsageError(
            f"trainer.num_nodes={trainer.num_nodes}: a run starts processes on its own machine only; "
            "set hydra/launcher=slurm_multinode, or start it with srun or torchrun"
        )
    if isinstance(trainer.accelerator, CPUAccelerator):  # GPUs Lightning has counted
        limits.require_cores(trainer.world_size)
    return trainer.world_size


def launch(cfg: DictConfig, out: Path, count: int) -> float:
    """Runs the ranks and returns what the first one did. What the others print goes to rank1.log, ...

    Raises:
        UsageError: a rank failed; the others were ended.
    """
    folder = out / ".ranks"
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    if HydraConfig.initialized():
        OmegaConf.save(HydraConfig.instance().cfg, folder / "hydra.yaml")
    common = environment(count)
    told: list[int] = []
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, _) -> None:
        told.append(number)
        for process in ranks:
            process.send_signal(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [signal.SIGTERM, signal.SIGUSR2]
        numbers += [signal.SIGINT] * (signal.getsignal(signal.SIGINT) != signal.SIG_IGN)  # nohup ignores it
        handlers = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        for r in range(count):
            ranks.append(start_rank(r, out, common))
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
        if told[0] == signal.SIGINT:
            raise KeyboardInterrupt  # run.py says how it goes on
        raise SystemExit(128 + told[0])
    return collect_results(folder, codes)


def environment(count: int) -> dict[str, str]:
    """The environment variables of all ranks: where they meet, and their share of the cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // count)),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


def start_rank(r: int, out: Path, common: dict[str, str]) -> subprocess.Popen:
    """Starts one rank, which ends when the pipe to it closes: when this process dies, however it dies."""
    (report := out / ".ranks" / f"rank{r}.json").unlink(missing_ok=True)
    with nullcontext() if r == 0 else (out / f"rank{r}.log").open("a") as log:
        command = [sys.executable, "-m", "recombine.runner.ranks", str(out)]
        env = common | {"LOCAL_RANK": str(r), distributed.REPORT: str(report)}
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, process_group=0)


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


def collect_results(folder: Path, codes: list[int | None]) -> float:
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


def work(out: Path) -> None:
    """One rank's life: the run from its saved configuration, then a report of how it ended."""
    threading.Thread(target=orphaned, daemon=True).start()
    folder, report = out / ".ranks", Path(os.environ[distributed.REPORT])
    if (folder / "hydra.yaml").is_file():
        HydraConfig.instance().cfg = OmegaConf.load(folder / "hydra.yaml")
    try:
        value = main(OmegaConf.load(folder / "config.yaml"), out)
    except KeyboardInterrupt:  # before or after a training, which leaves a state first
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        trace = None if isinstance(error, EXPECTED) else traceback.format_exc()
        report.write_text(json.dumps({"error": one_line(error), "trace": trace, "time": time.time()}))
        os._exit(1)  # a group that lost a rank may wait for it for ever
    report.write_text(json.dumps({"value": value}))
    distributed.destroy_group()


def orphaned() -> None:
    """Ends this process when the one that started it is gone."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
