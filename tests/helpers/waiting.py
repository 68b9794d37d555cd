"""Waiting for other processes: for what they leave, never for a time."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recombine.methods.adapters.full_and_probe import LinearProbe

LIMIT = 600  # seconds; nothing depends on them: they end a test that would hang
PAUSE = 0.02


def until(happened: Callable[[], Any], process=None) -> Any:
    """What `happened` gives as soon as that is something. process: what has to live until then."""
    end = time.monotonic() + LIMIT
    while not (found := happened()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(PAUSE)
    return found


def children(pid: int, word: str = "") -> list[int]:
    """The processes that a process started and that live. word: of their command line."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for task in tasks for child in task.read_text().split()]
    return [child for child in found if word in Path(f"/proc/{child}/cmdline").read_text()]


@dataclass(kw_only=True)
class Waits:
    """Makes a method's training wait in a step, while a file is there and the run has not been told to stop.

    shut: the file. A second one, named with .reached, says that the training waits. steps: those that it does before.
    """

    shut: str = ""
    steps: int = 0

    def penalty(self, model):
        self.begun = getattr(self, "begun", 0) + 1
        while self.begun > self.steps and Path(self.shut).is_file() and not told():
            Path(f"{self.shut}.reached").touch()
            time.sleep(PAUSE)
        return super().penalty(model)


@dataclass(kw_only=True)
class WaitingProbe(Waits, LinearProbe):
    """Trains the classification head alone."""


def told() -> int | None:
    """The signal that the training's state will act on at the end of the step."""
    return getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "told", None)
