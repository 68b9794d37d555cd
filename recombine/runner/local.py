"""Runs a sweep on this machine, in the worker processes of runner/pool.py."""

import os
from collections.abc import Sequence
from typing import Any

from hydra import version
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig

from recombine.errors import UsageError
from recombine.runner import effects, pool
from recombine.runner.ledger import Ledger
from recombine.runtime.threads import cores


def launch(
    context: HydraContext, config: DictConfig, job_overrides: Sequence[Sequence[str]], first: int, jobs: int | None
) -> list[JobReturn]:
    """Runs every job that is not finished, `jobs` at the same time, each with its share of the cores, or its GPUs.

    Args:
        job_overrides, first: as `Ledger` takes them.
        jobs: None: one a GPU, or one where there is none or where a run takes several.

    Raises:
        UsageError: the GPUs do not suffice for so many.
    """
    ledger = Ledger(context, config, job_overrides, first)
    gpus = visible_gpus() if config.trainer.accelerator != "cpu" else []
    devices = config.trainer.devices
    ranks = devices if isinstance(devices, int) and devices > 0 else 0  # of a run; 0: all that there are
    workers = jobs or (len(gpus) if ranks == 1 else 1) or 1
    if gpus and workers > 1 and (ranks == 0 or 1 < ranks > len(gpus) // workers):
        fix = "say trainer.devices=N, or fewer jobs"
        raise UsageError(f"hydra.launcher.jobs={workers}: {len(gpus)} GPUs, trainer.devices={devices} a run; {fix}")
    ranks = max(1, ranks)
    threads = str(max(1, cores() // (workers * ranks)))

    if left := len(ledger.folders) - len(ledger.ended):
        runs = f"{left} run{'s' * (left > 1)}, {workers} at a time"
        print(f"{ledger.root}: {runs}; what each prints is in its log.txt", flush=True)

    def environment(place: int) -> dict[str, str]:
        own = [gpus[i % len(gpus)] for i in range(place * ranks, (place + 1) * ranks)] if gpus and workers > 1 else []
        gpu = {"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), **gpu}

    arguments = ((job, (context, composed), folder / "log.txt") for job, composed, folder in ledger.todo())
    pool.run(run, arguments, ledger.end, workers=workers, environment=environment)
    return ledger.returns()


def run(job: tuple[HydraContext, DictConfig]) -> Any:
    """One run, in a worker: (Hydra's context, the configuration) -> its validation score."""
    from recombine.runner import ranks  # torch

    context, config = job
    setup_globals()
    version.setbase("1.3")  # run.py's

    def task(cfg: DictConfig) -> float:
        effects.refuse_misleading(cfg, HydraConfig.get())
        return ranks.task(cfg)

    done = run_job(task, config, "hydra.sweep.dir", "hydra.sweep.subdir", context)
    if done.status is not JobStatus.COMPLETED:
        raise done._return_value
    return done.return_value


def visible_gpus() -> list[str]:
    """The GPUs that runs may be given, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
