"""The one exception that users see: a single line with the offending value, the reason and the fix."""


class UsageError(ValueError):
    """Bad input. ``run.py`` prints its message as one line and exits with 2; everything else keeps its trace."""
