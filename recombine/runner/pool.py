"""Runs of a sweep in processes of their own: one that dies takes no other with it.

A worker imports torch once and then takes one run after the other; what a run prints goes to log.txt in its folder.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from recombine.errors import one_line

SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


@dataclass
class Worker:
    """A process, the pipe to it, what it works on, and its place (its GPU, where there are several)."""

    process: Any
    pipe: Connection
    place: int
    job: int | None = None


def run(
    function: Callable[[Any], Any],
    jobs: Iterator[tuple[int, Any, Path]],
    done: Callable[[int, Any, str | None], None],
    *,
    workers: int,
    environment: Callable[[int], dict[str, str]],
) -> None:
    """Runs function(argument) of every job (number, argument, log file) and calls done(number, value, error) for each.

    Args:
        function: importable by name; gets one argument, which pickles.
        environment: environment variables of the worker in place 0, 1, ...
    """
    free, busy = list(range(workers)), []
    idle: list[Worker] = []
    before = terminable()
    try:
        for number, argument, log in jobs:
            if not free and not idle:
                idle += finish(busy, done, free)
            worker = idle.pop() if idle else hire(free.pop(0), environment)
            worker.job = number
            busy.append(worker)
            worker.pipe.send((function, argument, log))
            while wait([w.pipe for w in busy], timeout=0):
                idle += finish(busy, done, free)
        while busy:
            idle += finish(busy, done, free)
    finally:
        for worker in [*busy, *idle]:
            worker.process.terminate() if worker in busy else worker.pipe.close()
        for worker in [*busy, *idle]:
            worker.process.join()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def terminable() -> Any:
    """Lets SIGTERM end this process as Ctrl-C does, so that no worker outlives it. Returns the handler before; None: no
    change, as this is not the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def hire(place: int, environment: Callable[[int], dict[str, str]]) -> Worker:
    """Starts a worker in that place, with the environment variables that go with it."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=work, args=(there,), daemon=False)
    with environ(environment(place)):
        process.start()
    there.close()
    return Worker(process, here, place)


def finish(busy: list[Worker], done: Callable, free: list[int]) -> list[Worker]:
    """Waits for workers that are through with their run or dead; returns those that can take another."""
    ready = wait([w.pipe for w in busy])
    idle = []
    for worker in [w for w in busy if w.pipe in ready]:
        busy.remove(worker)
        try:
            value, error = worker.pipe.recv()
            idle.append(worker)
        except (EOFError, ConnectionResetError):  # a pipe also ends when its process is killed
            worker.process.join()
            code = worker.process.exitcode
            value, error = None, f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            free.append(worker.place)
        done(worker.job, value, error)
    return idle


def work(pipe: Connection) -> None:
    """The worker's life: until the pipe closes, a run after the other."""
    while True:
        try:
            function, argument, log = pipe.recv()
        except EOFError:
            return
        value, error = None, None
        try:
            with logged(log):
                try:
                    value = function(argument)
                except Exception as failure:  # the run's, not the worker's
                    error = one_line(failure)
                    traceback.print_exc()
        except OSError as failure:  # a full disk, or a file where the folder should be
            error = error or f"{log}: cannot be written ({failure.strerror}); free some space, or move what is there"
        try:
            pipe.send((value, error))
        except BrokenPipeError:  # the sweep was killed: its next call finds what this run left
            return


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Sends the process's output, its children's too, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with path.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, before in zip((1, 2), kept, strict=True):
            os.dup2(before, stream)
            os.close(before)


@contextmanager
def environ(added: dict[str, str]) -> Iterator[None]:
    """Sets environment variables while the block runs; children started in it inherit them."""
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
