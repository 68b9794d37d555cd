"""Processes that are forked from one that has imported torch, where the project starts new interpreters."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from recombine.runner import pool, ranks
from recombine.training import distributed

_ends: list[int] = []  # of the pipes that close when the parent of the ranks dies, as long as only it holds them
for name in ("recombine.data.vision.offline", "peft"):  # what runs import when they begin
    import_module(name)


class Child:
    """A forked process, with what the project uses of subprocess.Popen and of multiprocessing.Process."""

    def __init__(self, work: Callable[[], int | None]):
        sys.stdout.flush()
        sys.stderr.flush()
        self.exitcode, self.stdin, self.pid = None, None, os.fork()
        if self.pid:
            return
        code = 1
        try:
            for number in (signal.SIGTERM, signal.SIGUSR2):  # a new process would not have its parent's handlers
                signal.signal(number, signal.SIG_DFL)
            code = work() or 0
        except SystemExit as end:
            code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self, options: int = os.WNOHANG) -> int | None:
        """The exit code, negative where a signal ended it; None while it lives."""
        if self.exitcode is None:
            pid, status = os.waitpid(self.pid, options)
            self.exitcode = os.waitstatus_to_exitcode(status) if pid else None
        return self.exitcode

    def wait(self) -> int:
        """Waits for the exit code."""
        return self.poll(0)

    join = wait

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


def fork_rank(r: int, out: Path, common: dict[str, str]) -> Child:
    """In the place of `ranks.start_rank`."""
    (report := out / ".ranks" / f"rank{r}.json").unlink(missing_ok=True)
    read, write = os.pipe()
    _ends.append(write)

    def work() -> None:
        for end in _ends:
            os.close(end)
        os.dup2(read, 0)
        os.environ |= common | {"LOCAL_RANK": str(r), distributed.REPORT: str(report)}
        ranks.work(out)

    child = Child(work)
    os.close(read)
    child.stdin = os.fdopen(write, "wb")
    return child


def fork_worker(place: int, environment: Callable[[int], dict[str, str]]) -> pool.Worker:
    """In the place of `pool.hire`."""
    here, there = multiprocessing.Pipe()

    def work() -> None:
        here.close()  # or it would never see its parent die
        os.environ |= environment(place)
        pool.work(there)

    child = Child(work)
    there.close()
    return pool.Worker(child, here, place)
