"""The keys of launchers and sweepers, checked before a sweep starts anything. This imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from recombine.errors import UsageError
from recombine.runtime.kinds import Count, Name, Share, Whole
from recombine.runtime.schema import typed

SCORED = ("adapt", "compress", "joint")  # stages with a validation score


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """The keys of the local launcher."""

    jobs: Count | None = None


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """The keys of the Slurm launchers, as conf/hydra/launcher/slurm.yaml explains them."""

    submitit_folder: Name
    name: Name
    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    constraint: Name | None = None
    nodes: Count = 1
    tasks_per_node: Count = 1
    gpus_per_node: Count | None = 1
    cpus_per_task: Count = 8
    mem_gb: Annotated[float, Field(gt=0, le=1e6)] | None = None
    timeout_min: Count = 240
    signal_delay_s: Whole = 120
    max_num_timeout: Whole = 100
    array_parallelism: Count = 256
    srun_args: list[str] | None = None
    setup: list[str] | None = None
    additional_parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The keys of the search that have a range. The others are Optuna's to know."""

    direction: Literal["maximize", "minimize"] = "maximize"
    n_trials: Count = 20
    n_jobs: Count = 1
    max_failure_rate: Share = 1.0


def require_search(params: Mapping[str, Any], config: DictConfig, arguments: Sequence[str]) -> None:
    """Refuses a search that can try nothing, or score nothing.

    Args:
        params: the keys of hydra.sweeper.
        config: of the sweep.
        arguments: the command line without the program.

    Raises:
        UsageError: a key or an interval is out of its range, nothing is searched, or a trial has no validation score.
    """
    ranged = {key: params[key] for key in SearchSettings.__dataclass_fields__ if key in params}
    typed(SearchSettings, ranged, "hydra.sweeper")
    lines = [*(f"{key}={value}" for key, value in (params.get("params") or {}).items()), *arguments]
    searched = [line for line in lines if is_searched(line)]
    if not searched:
        fix = "say for example 'optim.lr=tag(log,interval(1e-4,1e-2))' or method.rank=choice(2,4,8)"
        raise UsageError(f"hydra/sweeper=search: no key has values to choose from; {fix}")
    swept = {line.split("=")[0] for line in searched}
    if (stage := config.stage.get("name")) not in SCORED and "stage" not in swept:
        raise UsageError(f"hydra/sweeper=search: stage={stage} has no validation score; take {', '.join(SCORED)}")
    if config.data.get("select") == "last" and "data.select" not in swept:
        raise UsageError("data.select=last: a search needs a validation score; say data.select=val")


def best_trial(folder: str) -> str:
    """What a search found, as a line. folder: of the search, where Optuna's sweeper left a file."""
    found = OmegaConf.load(path := Path(folder) / "optimization_results.yaml")
    best = " ".join(f"{key}={value}" for key, value in found.best_params.items())
    return f"best: {best}, validation score {found.best_value:.4g}; {path}"


def is_searched(line: str) -> bool:
    """Whether an override has several values, of which Optuna can choose.

    Raises:
        UsageError: it cannot choose from them.
    """
    from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override  # Optuna is an extra

    override = OverridesParser.create().parse_override(line)
    try:
        create_optuna_distribution_from_override(override)
    except (ValueError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().rstrip(".")
        raise UsageError(f"{line}: {why}; an interval is interval(LOWEST,HIGHEST), a choice is choice(A,B)") from error
    return override.is_sweep_override()
