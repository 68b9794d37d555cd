"""python run.py [group=choice ...] [key=value ...]: one run, an experiment, or a sweep with -m. --help teaches."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import recombine.runtime.naming  # noqa: F401  resolvers that conf/config.yaml uses
from recombine.errors import EXPECTED, UsageError, one_line
from recombine.runner.announce import say_what_loads
from recombine.runtime import budget_words, help, logs, threads

DEBUG = "HYDRA_FULL_ERROR" in os.environ  # a user who wants traces gets them
failures: list[Exception] = []


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="config")
def main(cfg: DictConfig) -> float:
    """One run of a composed configuration; Hydra calls it. Returns the validation score."""
    say_what_loads(cfg, HydraConfig.get().runtime.choices)
    from recombine.runner import ranks  # imports torch

    try:
        return ranks.task(cfg)
    except EXPECTED as error:  # Hydra would print lines of its own
        failures.append(error)
        return float("nan")


def cli() -> int:
    """Runs the command line. Bad input is one line on stderr and exit code 2."""
    failures.clear()
    arguments = sys.argv[1:]
    if any(flag in arguments for flag in help.FLAGS):
        return show_help(arguments)
    threads.wait_asleep()
    logs.quiet_libraries()  # for the sweeps, which load some in this process
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors of its own and exits
    try:
        budget_words.refuse_two_keys(arguments)
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


def show_help(arguments: list[str]) -> int:
    """Prints the help, which Hydra would print without the comments of conf/."""
    try:
        print(help.text(arguments), flush=True)
    except BrokenPipeError:  # its reader has seen enough: --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UsageError as error:
        print(f"run.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
