"""The one exception that users see, a line with the offending value, the reason and the fix; and how others read."""

from hydra.errors import HydraException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException


class UsageError(ValueError):
    """Bad input. ``run.py`` prints its message as one line and exits with 2; everything else keeps its trace."""


EXPECTED = (UsageError, HydraException, OmegaConfBaseException, OSError)  # a user can mend these


def one_line(error: BaseException) -> str:
    """What went wrong, without a trace."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=??? needs a value: say {error.full_key}=..."
    text = " ".join(line.strip() for line in str(error).split("\nConfig search path")[0].splitlines() if line.strip())
    return text if isinstance(error, EXPECTED) else f"{type(error).__name__}: {text}"
