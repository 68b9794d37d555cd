"""python run.py [group=choice ...] [key=value ...]: one run, an experiment, or a sweep with -m. --help teaches."""

import os
import signal
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

import recombine.runtime.naming  # noqa: F401  resolvers that conf/config.yaml uses
from recombine.errors import EXPECTED, UsageError, as_text, one_line
from recombine.runner import arguments, effects, typed_keys
from recombine.runner.announce import say_what_loads
from recombine.runtime import budget_words, help, logs, threads

DEBUG = "HYDRA_FULL_ERROR" in os.environ  # a user who wants traces gets them
failures: list[Exception] = []
stopped: list[str] = []  # the folder of a run that Ctrl-C ended
cores: list[str | None] = [None]  # how many torch takes, in words; None: all


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="config")
def main(cfg: DictConfig) -> float:
    """One run of a composed configuration; Hydra calls it. Returns the validation score."""
    try:
        effects.refuse_misleading(cfg, HydraConfig.get())
        say_what_loads(cfg, HydraConfig.get().runtime.choices, cores[0])
        from recombine.runner import ranks  # imports torch

        return ranks.task(cfg)
    except EXPECTED as error:  # Hydra would print lines of its own
        failures.append(error)
        return float("nan")
    except KeyboardInterrupt:
        if HydraConfig.get().mode == RunMode.RUN:
            stopped.append(HydraConfig.get().run.dir)  # Hydra forgets it on the way out
        raise


def cli() -> int:
    """Runs the command line. Bad input is one line on stderr and exit code 2."""
    failures.clear()
    stopped.clear()
    given = sys.argv[1:]
    if any(flag in given for flag in help.FLAGS):
        return show_help(given)
    cores[0] = threads.settle()
    logs.quiet_libraries()  # for the sweeps, which load some in this process
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors of its own and exits
    try:
        budget_words.refuse_two_keys(given)
        flags, overrides = arguments.prepared(given)
        typed_keys.refuse_unread(overrides)
        sys.argv[1:] = [*flags, *arguments.cell_by_cell(overrides)]
        main()
    except EXPECTED as error:
        failures.append(error)
    except Exception as error:
        if not raised_by_hydra(error):
            raise
        failures.append(UsageError(f"the command line cannot be read: {one_line(error)}; correct it"))
    except KeyboardInterrupt:
        print(f"run.py: stopped; {going_on()}", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if not DEBUG:
            del os.environ["HYDRA_FULL_ERROR"]
    if failures and DEBUG:
        raise failures[0]
    for error in failures:
        print(f"run.py: {one_line(error, given)}", file=sys.stderr)
    return 2 if failures else 0


def going_on() -> str:
    """How a run or a sweep that was stopped goes on. A sweep has said its folder."""
    folder = as_text("hydra.run.dir", stopped[0]) if stopped else "the same folder"
    return f"the same command with {folder} goes on"


def raised_by_hydra(error: Exception) -> bool:
    """Whether Hydra could not compose what was typed. Some of that it refuses by plain ValueErrors, with a trace."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    began = any(frame.f_code is main.__wrapped__.__code__ for frame in frames)
    return not began and frames[-1].f_globals["__name__"].startswith(("hydra.", "omegaconf."))


def show_help(given: list[str]) -> int:
    """Prints the help, which Hydra would print without the comments of conf/."""
    try:
        print(help.text(given), flush=True)
    except BrokenPipeError:  # its reader has seen enough: --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UsageError as error:
        print(f"run.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
