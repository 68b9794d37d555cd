"""What became of each run of a sweep, from the files in its folder: finished, failed or to do.

"job" is the number of a run in its sweep, from 0.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from recombine import results
from recombine.errors import EXPECTED, UsageError, one_line
from recombine.runtime.atomic import atomic_write
from recombine.runtime.naming import run_folder

FAILED = "failed.txt"  # one line: why


class Ledger:
    """The runs of one sweep and how each ended. Launchers ask it what to run, and tell it how that ended.

    A finished run is not run again. A failed one is run again only with `retry=true`.

    Args:
        job_overrides: the command line of each run, without the program, for example ["method=lora", "seed=0"].
        first: the number of the first job; Hydra's sweepers count on from earlier calls.
    """

    def __init__(self, context: HydraContext, config: DictConfig, job_overrides: Sequence[Sequence[str]], first: int):
        self.loader, self.config, self.first = context.config_loader, config, first
        self.overrides = [list(o) for o in job_overrides]
        self.root = Path(config.hydra.sweep.dir)
        self.folders = [self.root / run_folder(o) for o in self.overrides]
        self.ended: dict[int, tuple[Any, str | None]] = {}  # job: (value, error)
        self.start, self.ran = time.monotonic(), 0
        refused = 0
        for job, folder in enumerate(self.folders):
            if (folder / "result.json").is_file() and config.data.task != "all":  # a suite looks task by task
                refused += self.refuses(job, folder)
            elif (failed := folder / FAILED).is_file():
                if config.retry:
                    failed.unlink()
                else:
                    self.ended[job] = None, failed.read_text().strip()
        if self.ended:
            failed = sum(error is not None for _, error in self.ended.values()) - refused
            print(
                f"{self.root}: {len(self.ended) - failed - refused} finished before"
                + (f", {failed} failed before (retry=true runs them again)" if failed else "")
                + (f", {refused} refused" if refused else ""),
                *(f"FAILED {self.folders[job]}: {why}" for job, (_, why) in self.ended.items() if why is not None),
                sep="\n",
                flush=True,
            )

    def refuses(self, job: int, folder: Path) -> bool:
        """Takes the result that a folder holds. True: it is of another configuration, which counts as a failure.

        A run that has yet to write what `export` asks for is taken by no one: it goes on.
        """
        try:
            composed = self.compose(job)
            config = results.settings(composed)
            found = results.load_finished(folder, config, composed.hydra.overrides.task)
            if not results.missing_exports(config.get("export"), found):
                self.ended[job] = results.score(found), None
        except EXPECTED as error:
            self.ended[job] = None, one_line(error)
            return True
        return False

    def compose(self, job: int) -> DictConfig:
        """The configuration of one job."""
        composed = self.loader.load_sweep_config(self.config, self.overrides[job])
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = self.first + job
        return composed

    def todo(self) -> Iterator[tuple[int, DictConfig, Path]]:
        """(job, configuration, folder) of what has to run. A run that cannot be composed has failed."""
        for job, folder in enumerate(self.folders):
            if job in self.ended:
                continue
            try:
                composed = self.compose(job)
            except EXPECTED as error:
                self.end(job, None, one_line(error))
                continue
            yield job, composed, folder

    def end(self, job: int, value: Any, error: str | None) -> None:
        """Writes down how a run ended, and prints where the sweep stands."""
        self.ended[job] = value, error
        self.ran += 1
        folder = self.folders[job]
        if error is not None and not results.running(folder):  # another sweep's run is not a failure
            try:
                with atomic_write(folder / FAILED) as temporary:  # none rather than an empty one
                    temporary.write_text(error + "\n")
            except UsageError as lost:  # the other runs go on
                error += f" ({lost})"
        failed, left = sum(e is not None for _, e in self.ended.values()), len(self.folders) - len(self.ended)
        soon = f", {duration((time.monotonic() - self.start) / self.ran * left)} to go" if left else ""
        scored = isinstance(value, float) and not math.isnan(value)
        news = f"FAILED: {error}" if error is not None else f"validation score {value:.4g}" if scored else "done"
        print(
            f"[{len(self.ended) - failed} done, {failed} failed, {left} left{soon}] {folder.name}: {news}", flush=True
        )

    def returns(self) -> list[JobReturn]:
        """As Hydra's sweepers take them, in the order of the jobs."""
        return [
            JobReturn(
                overrides=self.overrides[job],
                status=JobStatus.COMPLETED if error is None else JobStatus.FAILED,
                working_dir=str(folder),
                _return_value=value if error is None else UsageError(error),
            )
            for job, folder in enumerate(self.folders)
            for value, error in [self.ended.get(job, (None, "did not run"))]
        ]


def refuse_failed(returns: Sequence[JobReturn]) -> None:
    """Raises where a run failed. The ledger has said why.

    Raises:
        UsageError: any run failed.
    """
    if failed := [r for r in returns if r.status is JobStatus.FAILED]:
        again = any((Path(r.working_dir) / FAILED).is_file() for r in failed)
        hint = "; retry=true runs them again" if again else ""
        raise UsageError(f"{len(failed)} of {len(returns)} runs failed{hint}")


def duration(seconds: float) -> str:
    """7 s, 12 min, 3 h 05 min"""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
