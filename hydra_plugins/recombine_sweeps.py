"""What Hydra calls of recombine.runner: sweepers and the local launcher. It looks for plugins in this namespace only.

GridSweeper: the cells of an experiment's grid, or the product of what -m gives.
SearchSweeper: hydra-optuna-sweeper, whose complaints become one line.
LocalLauncher: runs them on this machine, in processes of their own.
"""

import logging
from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper


class GridSweeper(Sweeper):
    """Runs the cells of an experiment's grid, or the product of what -m gives.

    Args:
        params: sweeps that every call makes unless it says otherwise, for example {"seed": "0,1,2"}.
    """

    def __init__(self, params: dict[str, str] | None = None):
        self.params = params or {}

    def setup(self, *, hydra_context, task_function, config) -> None:
        """Keeps what Hydra gives and makes the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Runs every cell. arguments: the command line without the program.

        Raises:
            UsageError: a run failed.
        """
        from recombine.runner import grid, ledger, sweep_table

        typed = {argument.split("=")[0] for argument in arguments}
        params = [f"{key}={value}" for key, value in self.params.items() if key not in typed]
        if self.config.get("plan") is not None:
            from recombine.runner import plan_table

            plan_table.several(self.hydra_context.config_loader, self.config, [*params, *arguments])
            return []
        given = [*params, *arguments]
        returns = self.launcher.launch(grid.jobs(self.config, given), 0)
        cells = grid.cells(grid.plain_axes(self.config), given, self.config.only)
        if text := sweep_table.table(cells, returns, arguments):
            print(text, flush=True)
        ledger.refuse_failed(returns)
        return returns


class SearchSweeper(Sweeper):
    """Runs hydra-optuna-sweeper with its own keys, and turns its complaints into one line."""

    def __init__(self, **params: Any):
        self.params = params

    def setup(self, *, hydra_context, task_function, config) -> None:
        """Makes Optuna's sweeper."""
        from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

        self.config = config
        self.search = OptunaSweeper(**self.params)
        self.search.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Runs the search.

        Raises:
            UsageError: it can try or score nothing, or a trial ended without a number.
        """
        from recombine.errors import EXPECTED, UsageError, one_line
        from recombine.runner.sweep_settings import best_trial, require_search

        if self.config.get("plan") is not None:
            raise UsageError("stage=plan: what a search tries is not known before; plan one run, or a grid")
        require_search(self.params, self.config, arguments)
        for name in ("optuna", "hydra_plugins.hydra_optuna_sweeper"):  # the ledger says what becomes of the trials
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            self.search.sweep(arguments)
            print(best_trial(self.config.hydra.sweep.dir), flush=True)
        except EXPECTED:
            raise
        except ValueError as error:  # no trial ended with a number, or one ended with nan
            fix = "a trial needs a budget that it can meet and validation data (data.select=val)"
            raise UsageError(f"hydra/sweeper=search: {one_line(error).removeprefix('ValueError: ')} {fix}") from error


class LocalLauncher(Launcher):
    """Runs a sweep on this machine, each run in a process of its own.

    Args:
        jobs: how many run at the same time; None: one a GPU, or one where there is none.
    """

    def __init__(self, jobs: int | None = None):
        self.jobs = jobs

    def setup(self, *, hydra_context, task_function, config) -> None:
        """Keeps what Hydra gives.

        Raises:
            UsageError: a key is out of its range.
        """
        from recombine.runner.sweep_settings import LocalSettings
        from recombine.runtime.schema import typed

        typed(LocalSettings, {"jobs": self.jobs}, "hydra.launcher")
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs and waits for them."""
        from recombine.runner import local

        return local.launch(self.hydra_context, self.config, job_overrides, initial_job_idx, self.jobs)
