"""python run.py [group=choice ...] [key=value ...]: one run, an experiment, or a sweep with -m. --help teaches."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import recombine.runtime.naming  # noqa: F401  resolvers that conf/config.yaml uses
from recombine.errors import EXPECTED, one_line
from recombine.runtime import logs, progress, threads

DEBUG = "HYDRA_FULL_ERROR" in os.environ  # a user who wants traces gets them
failures: list[Exception] = []


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="config")
def main(cfg: DictConfig) -> float:
    progress.say_what_loads(cfg, HydraConfig.get().runtime.choices)
    from recombine.runner import ranks  # imports torch

    try:
        return ranks.task(cfg)
    except EXPECTED as error:  # Hydra would print lines of its own
        failures.append(error)
        return float("nan")


def cli() -> int:
    """Runs the command line. Bad input is one line on stderr and exit code 2."""
    failures.clear()
    threads.wait_asleep()
    logs.quiet_libraries()  # for the sweeps, which load some in this process
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors of its own and exits
    try:
        main()
    except EXPECTED as error:
        failures.append(error)
    finally:
        if not DEBUG:
            del os.environ["HYDRA_FULL_ERROR"]
    if failures and DEBUG:
        raise failures[0]
    for error in failures:
        print(f"run.py: {one_line(error)}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(cli())
