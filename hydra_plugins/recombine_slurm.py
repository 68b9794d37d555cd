"""What Hydra calls of recombine.runner.slurm. It looks for plugins in this namespace only, and imports them all."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher


class SlurmLauncher(Launcher):
    """Runs a sweep as Slurm jobs. It takes hydra-submitit-launcher's keys, and srun_args."""

    def __init__(self, **params: Any):
        self.params = params

    def setup(self, *, hydra_context, task_function, config) -> None:
        """Keeps what Hydra gives.

        Raises:
            UsageError: a key is out of its range, or the extra packages for Slurm are not installed.
        """
        from recombine.errors import UsageError
        from recombine.runner.sweep_settings import SlurmSettings
        from recombine.runtime.schema import typed

        typed(SlurmSettings, self.params, "hydra.launcher")

        try:
            from recombine.runner.slurm import Jobs
        except ModuleNotFoundError as error:
            raise UsageError(f"hydra/launcher=slurm needs {error.name}: pip install -e '.[slurm]'") from error
        self.jobs = Jobs(**self.params)
        self.jobs.setup(hydra_context=hydra_context, task_function=None, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs and waits for them."""
        return self.jobs.launch(job_overrides, initial_job_idx)
