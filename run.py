"""python run.py [group=choice ...] [key=value ...]: one run, or a sweep with -m. `python run.py --help` teaches."""

import os
import sys
from pathlib import Path

DEBUG = "HYDRA_FULL_ERROR" in os.environ  # a user who wants traces gets them
os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors of its own and exits

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException  # noqa: E402

from recombine.errors import UsageError  # noqa: E402
from recombine.naming import run_name  # noqa: E402

OmegaConf.register_new_resolver("run_name", run_name, replace=True)
EXPECTED = (UsageError, HydraException, OmegaConfBaseException, OSError)
failures: list[str] = []


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="config")
def main(cfg: DictConfig) -> float:
    from recombine import build  # torch and Lightning are not needed for --help

    try:
        return build.main(cfg, Path(HydraConfig.get().runtime.output_dir))
    except EXPECTED as error:  # one run of a sweep must not end the others
        refuse(error)
        return float("nan")


def refuse(error: Exception) -> None:
    """Prints what went wrong in one line, and remembers it for the exit code."""
    if DEBUG:
        raise error
    text = " ".join(line.strip() for line in str(error).split("\nConfig search path")[0].splitlines() if line.strip())
    if isinstance(error, MissingMandatoryValue):
        text = f"{error.full_key}=??? needs a value: say {error.full_key}=..."
    failures.append(text)
    print(f"run.py: {text}", file=sys.stderr)


def cli() -> int:
    """Runs the command line. Bad input is one line on stderr and exit code 2."""
    failures.clear()
    try:
        main()
    except EXPECTED as error:
        refuse(error)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(cli())
