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
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from recombine.errors import UsageError  # noqa: E402
from recombine.naming import run_name  # noqa: E402

OmegaConf.register_new_resolver("run_name", run_name, replace=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    from recombine import build  # torch and Lightning are not needed for --help

    return build.main(cfg, Path(HydraConfig.get().runtime.output_dir))


def one_line(error: BaseException) -> str:
    """The first thing that went wrong, in one line; Hydra's lists of choices are joined."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    keep = [
        line for line in lines if not line.startswith(("Config search path", "provider=", "full_key", "object_type"))
    ]
    return " ".join(keep).replace("\t", ", ")


if __name__ == "__main__":
    try:
        main()
    except (UsageError, HydraException, OmegaConfBaseException, OSError) as error:
        if DEBUG:
            raise
        print(f"run.py: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
