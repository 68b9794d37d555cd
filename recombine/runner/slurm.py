"""Runs a sweep as one Slurm job array, and outlives whatever becomes of its jobs.

hydra-submitit-launcher waits for ever for a job that died where the cluster keeps no accounts (sacct), and drops the
results of all when one died. Here a job is over when its result is there, or when squeue no longer knows it.
"""

import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import submitit
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig

from recombine.errors import UsageError, one_line
from recombine.runner import local
from recombine.runner.ledger import Ledger
from recombine.runner.pool import environ

POLL = 2.0  # seconds between two looks
GRACE = 15.0  # seconds in which a file system shows the result of a job that left the queue


class Jobs(SlurmLauncher):
    """A callable that submitit runs in every job; `checkpoint`, inherited, has it run again after a signal."""

    def __call__(self, config: DictConfig) -> tuple[Any, str | None]:
        """(value, None), or (None, what went wrong)."""
        try:
            return local.run((self.hydra_context, config)), None
        except Exception as error:
            traceback.print_exc()
            return None, one_line(error)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Runs every job that is not finished, and returns when all are over. Hydra calls it."""
        ledger = Ledger(self.hydra_context, self.config, job_overrides, initial_job_idx)
        todo = [(number, config) for number, config, _ in ledger.todo()]
        if todo:
            numbers, configs = zip(*todo, strict=True)
            # a job array is read by other processes: what they import has to be found there too
            with environ({"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}):
                jobs = self.submit(configs)
            print(f"{ledger.root}: submitted {len(jobs)} jobs, {jobs[0].job_id} to {jobs[-1].job_id}", flush=True)
            self.follow(dict(zip(numbers, jobs, strict=True)), ledger)
        return ledger.returns()

    def submit(self, configs: Sequence[DictConfig]) -> list[submitit.Job]:
        """Submits the runs as one job array.

        Raises:
            UsageError: Slurm refuses a key of the launcher.
        """
        own = ("submitit_folder", "max_num_timeout")
        shared = set(BaseQueueConf.__dataclass_fields__)
        knobs = {k if k in shared else f"slurm_{k}": v for k, v in self.params.items() if k not in own}
        try:
            executor = submitit.AutoExecutor(
                self.params["submitit_folder"],
                cluster="slurm",
                slurm_max_num_timeout=self.params["max_num_timeout"],
            )
            executor.update_parameters(**knobs)
            return executor.map_array(self, configs)
        except (RuntimeError, NameError, TypeError) as error:  # FailedJobError, what sbatch says, is the first
            raise UsageError(f"hydra/launcher: {one_line(error)}; correct that key, or take launcher=local") from error

    def follow(self, jobs: dict[int, submitit.Job], ledger: Ledger) -> None:
        """Until every job is over. Ctrl-C cancels those that are left."""
        gone: dict[int, float] = {}  # job: when squeue first did not know it
        try:
            while jobs:
                time.sleep(POLL)
                alive = queued([job.job_id for job in jobs.values()])
                for number, job in list(jobs.items()):
                    first = job.task(0)  # of several ranks, the one whose word counts
                    if first.paths.result_pickle.exists() and job.job_id not in alive:
                        value, error = self.read(first)
                    elif job.job_id in alive or time.monotonic() - gone.setdefault(number, time.monotonic()) < GRACE:
                        continue
                    else:
                        value, error = None, died(job)
                    del jobs[number]
                    ledger.end(number, value, error)
        except KeyboardInterrupt:
            subprocess.run(["scancel", *(job.job_id for job in jobs.values())])
            raise

    def read(self, job: submitit.Job) -> tuple[Any, str | None]:
        """(value, error) that a job left."""
        try:
            return job.result()
        except Exception as error:  # the job's: submitit's own end, or what could not be unpickled
            return None, f"job {job.job_id}: {str(error).strip().splitlines()[-1]}"


def queued(ids: list[str]) -> set[str]:
    """Those of the jobs that wait, run or are about to run again; all of them while Slurm does not answer."""
    arrays = ",".join(sorted({job.split("_")[0] for job in ids}))
    done = subprocess.run(["squeue", "-h", "-r", "-o", "%i", "-j", arrays], capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        return set(ids)
    return set(done.stdout.split())


def died(job: submitit.Job) -> str:
    """Why a job left no result, as far as Slurm still knows."""
    shown = subprocess.run(["scontrol", "-o", "show", "job", job.job_id], capture_output=True, text=True).stdout
    facts = dict(re.findall(r"(JobState|Reason|ExitCode)=(\S+)", shown))
    known = f"{facts['JobState']}, exit code {facts['ExitCode']}" if "JobState" in facts else "Slurm forgot why"
    return f"job {job.job_id} died without a result ({known}); its log is {job.paths.stderr}"
